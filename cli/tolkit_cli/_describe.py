"""A bundle's manifest in rows and words, for `tol inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, number_text, percent_text

if TYPE_CHECKING:
    from tolkit_formats import Bundle, Manifest
    from tolkit_formats.partial import Partial

__all__ = [
    "ERROR_COLUMNS",
    "LAYER_COLUMNS",
    "error_lines",
    "error_rows",
    "layer_rows",
    "lineage_text",
    "record_bytes",
    "show_partial",
]

ERROR_COLUMNS = (
    Column("relative_error", "error", number_text),
    Column("running_sum_error", "running sum", number_text),
)
LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("status", "status", right=False),
    Column("codec", "codec", right=False),
    Column("bytes_per_row", "bytes/row", lambda value: f"{value:,}"),
    Column("bits_per_value", "bits/value", lambda value: f"{value:.3f}"),
    Column("basis_bytes", "basis", bytes_text),
    *ERROR_COLUMNS,
)


def layer_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """One row a layer of the source model. bits_per_value counts the layer's record bytes and
    basis over V x D; checksums and padding belong to no layer and count in the total only."""
    from tolkit_formats.codecs import codec_label

    rows: list[dict[str, Any]] = []
    kept = set(bundle.layer_ids)
    records = bundle.manifest.num_rows
    errors = {row["layer"]: row for row in error_rows(bundle.manifest)}
    for layer, state in enumerate(bundle.manifest.layers):
        status = state.status if state.into is None else f"folded into {state.into}"
        row: dict[str, Any] = {**errors[layer], "status": status}
        if layer in kept:
            codec = bundle.plane_codec(layer)
            row["codec"] = codec_label(codec)
            row["basis_bytes"] = _shared_bytes(codec.shared_shapes()) or None
            if bundle.manifest.coding is not None:  # a row's bytes are those of all layers
                rows.append(row)
                continue
            row["bytes_per_row"] = sum(codec.segments())
            stored = row["bytes_per_row"] * records + (row["basis_bytes"] or 0)
            row["bits_per_value"] = 8 * stored / (bundle.vocab_size * bundle.hidden_size)
        rows.append(row)
    return rows


def record_bytes(manifest: Manifest) -> list[int]:
    """Bytes of a record in each tier; where they are entropy-coded the mean, rounded up."""
    sizes = []
    for tier in manifest.tiers:
        names = [f"tables/{tier.shard_name(shard)}" for shard in range(tier.num_shards)]
        mean = -(-sum(manifest.files[name].size_bytes for name in names) // tier.num_rows)
        sizes.append(mean if tier.coded else tier.stride)
    return sizes


def show_partial(out: Output, partial: Partial) -> None:
    """How many tokens have a record, and what share of counted text they are."""
    said = f"{partial.rows:,} tokens"
    if partial.covered is not None:
        said += f", {percent_text(partial.covered, 2)} of those counted; others from FFN weights"
    out.field("metrics", "rows", partial.rows, "records", said)
    out.record("metrics", covered=partial.covered)


def error_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Both errors of every layer as the manifest records them, None where it does not."""
    known = {errors.layer: errors for errors in manifest.encoding.errors}
    rows: list[dict[str, Any]] = []
    for layer in range(manifest.num_layers):
        found = known.get(layer)
        rows.append(
            {
                "layer": layer,
                "relative_error": found.relative if found else None,
                "running_sum_error": found.running_sum if found else None,
            }
        )
    return rows


def error_lines(manifest: Manifest) -> list[str]:
    """What the recorded errors are relative to: the tables that the steps of the history read."""
    errors = manifest.encoding.errors
    if not errors:
        return ["errors: not recorded in this bundle"]
    lines = []
    for step, entry in enumerate(manifest.history):
        own = [e.layer for e in errors if e.relative_step == step]
        sums = [e.layer for e in errors if e.running_sum_step == step]
        what = [
            f"{name} of {_layers_text(layers)}"
            for name, layers in (("error", own), ("running sum", sums))
            if layers
        ]
        if what:
            read = "the FFN outputs" if entry.parent is None else "the tables"
            lines.append(
                f"relative to {read} that step {step + 1}, {entry.command}, read: {', '.join(what)}"
            )
    return lines


def _layers_text(layers: list[int]) -> str:
    """Ascending layers in words: "layers 0-3, 5"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    text = ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans)
    return f"layers {text}" if len(layers) > 1 else f"layer {text}"


def lineage_text(manifest: Manifest) -> str:
    """The commands that made it, oldest first: "build, compress, drop-layers"."""
    return ", ".join(step.command for step in manifest.history)


def _shared_bytes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    from tolkit_formats.tensorfile import ITEM_BYTES

    return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in shapes.values())
