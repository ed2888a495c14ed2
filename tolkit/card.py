"""The README.md inside a bundle: what it is and how it was made. Build facts only, no claims."""

from __future__ import annotations

import json
from itertools import groupby

from tolkit_formats.codecs import codec_label
from tolkit_formats.manifest import Manifest

__all__ = ["bundle_card"]


def bundle_card(manifest: Manifest) -> str:
    """Markdown text; depends on the manifest's content alone, not on the folder's name."""
    labels = {p.layer: codec_label(p.codec) for p in manifest.tiers[0].planes}
    words = []
    for layer, status in enumerate(manifest.layers):
        if status.status == "kept":
            words.append(labels[layer])
        elif status.into is not None:
            words.append(f"folded into {status.into}")
        else:
            words.append("dropped")
    rows = []
    for word, group in groupby(enumerate(words), key=lambda item: item[1]):
        layers = [layer for layer, _ in group]
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        rows.append(f"| {span} | {word} |")
    steps = [
        f"{i}. `{step.command}` {json.dumps(dict(step.options), sort_keys=True)} ({step.tool})"
        for i, step in enumerate(manifest.history, 1)
    ]
    last = next((e for e in reversed(manifest.encoding.errors) if e.running_sum is not None), None)
    losses = []
    if last is not None and last.running_sum_step is not None:
        step = f"step {last.running_sum_step + 1} below"
        losses = [
            f"- error of the running sum at layer {last.layer}: {last.running_sum:.6g}, "
            f"relative to what {step} read"
        ]
    shape = f"{manifest.vocab_size:,} x {manifest.num_layers} x {manifest.hidden_size}"
    lines = [
        "# Token-wise lookup tables",
        "",
        "A bundle of a MemoryLLM's tables, written by tolkit. In this folder: `tol inspect .` says "
        "what it holds, `tol verify .` checks every byte.",
        "",
        f"- tokens x layers x width: {shape}",
        *_coverage(manifest),
        f"- error feedback over depth: {'yes' if manifest.encoding.feedback else 'no'}",
        *losses,
        "",
        "| layers | stored as |",
        "|---|---|",
        *rows,
        "",
        "## Made by",
        "",
        *steps,
        "",
    ]
    return "\n".join(lines)


def _coverage(manifest: Manifest) -> list[str]:
    partial = manifest.partial
    if partial is None:
        return []
    share = "" if partial.covered is None else f", {100 * partial.covered:.2f} % of those counted"
    return [
        f"- tokens with a record: {partial.rows:,}{share}; the rows of all others are computed "
        "from the weights in ffn.safetensors"
    ]
