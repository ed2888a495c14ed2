"""Compression figures on a trained 12-layer MemoryLLM beside those of independent prototype code.

Needs the development data (a trained checkpoint and text, not part of the project):

    python tests/bench/reference_figures.py --shared ../shared [--out FOLDER]

Prints a Markdown table: bits per value, perplexity change, KL and top-1 of this code, the
figures its README states, and whether the two agree within the errors stated there.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import zstandard

from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.data import Tokenizer
from tolkit.evaluate import Window, Windows, evaluate
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable

LENGTH, WINDOWS = 256, 64


@dataclass(frozen=True)
class Expected:
    """Figures of the reference README: perplexity change in percent, KL in nats, top-1 in %."""

    ppl_percent: float
    kl: float | None = None
    top1: float | None = None


# Copied from the reference checkpoint's README ("Figures measured on it").
METHODS: dict[str, tuple[CompressSpec | None, Expected]] = {
    "raw f32": (None, Expected(0.0, 0.0, 100.0)),
    "int8, plain": (CompressSpec(codec="int8", feedback=False), Expected(-0.02, 0.00002, 99.5)),
    "nf4, plain": (CompressSpec(codec="nf4", feedback=False), Expected(0.07, 0.00152, 96.2)),
    "nf4, feedback": (CompressSpec(codec="nf4"), Expected(0.06, 0.00021, 98.7)),
    "int4, plain": (CompressSpec(codec="int4", feedback=False), Expected(0.29, 0.00350, 94.5)),
    "SVD 50 %, plain": (
        CompressSpec(rank="50%", feedback=False, weights="none"),
        Expected(0.97, 0.0057, 93),
    ),
    # The README says "weighted by counts"; here a row's weight is (count + 1)^0.5. Both are shown.
    "SVD 50 %, plain, weight count^0.5": (
        CompressSpec(rank="50%", feedback=False, weights="counts"),
        Expected(0.65, 0.0031, 95),
    ),
    "SVD 50 %, plain, weight count": (
        CompressSpec(rank="50%", feedback=False, weights="squares"),
        Expected(0.65, 0.0031, 95),
    ),
    "SVD 50 %, feedback": (CompressSpec(rank="50%", weights="none"), Expected(0.10, 0.0008, 97)),
    "SVD 25 %, plain": (
        CompressSpec(rank="25%", feedback=False, weights="none"),
        Expected(7.6, 0.064, 79),
    ),
    "SVD 25 %, plain, weight count^0.5": (
        CompressSpec(rank="25%", feedback=False, weights="counts"),
        Expected(4.5, 0.036, 85),
    ),
    "SVD 25 %, plain, weight count": (
        CompressSpec(rank="25%", feedback=False, weights="squares"),
        Expected(4.5, 0.036, 85),
    ),
    "SVD 25 %, feedback": (CompressSpec(rank="25%", weights="none"), Expected(math.nan)),
    "SVD 50 % x nf4, plain": (
        CompressSpec(rank="50%", codec="nf4", feedback=False, weights="none"),
        Expected(1.7, 0.0121, 90),
    ),
}
DROPPED = [10.4, 3.5, 6.6, 1.8, 1.1, 0.67, 0.39, 0.75, 1.1, 1.0, 1.2, 1.3]
FOLDED = [1.9, 0.16, 0.52, 0.38, 0.30, 0.14, 0.09, 0.03, 0.16, -0.01, 0.14]
SETS: dict[str, tuple[DropSpec, Expected]] = {
    "5, 6 dropped": (DropSpec((5, 6), fold=False), Expected(1.9)),
    "5, 6 folded into 7": (DropSpec((5, 6)), Expected(0.52)),
    "4 -> 5, 6 -> 7": (DropSpec((4, 6)), Expected(0.37)),
    "4-7 dropped": (DropSpec((4, 5, 6, 7), fold=False), Expected(8.7)),
    "4-7 folded into 8": (DropSpec((4, 5, 6, 7)), Expected(2.4)),
    "3 -> 4, 5 -> 6, 7 -> 8, 9 -> 10": (DropSpec((3, 5, 7, 9)), Expected(0.54, 0.0055)),
}


def slices(shared: Path, tokenizer: Tokenizer) -> list[Windows]:
    """Slices A and B of the README: 64 windows of 256 without overlap or prefix, each."""
    packed = (shared / "data/text/novels.valid.txt.zst").read_bytes()
    text = zstandard.ZstdDecompressor().decompress(packed).decode().replace("\f", "")
    text = re.sub(r"\n{2,}", "\n", text)
    ids = np.concatenate(
        [np.asarray(i, np.int32) for i in tokenizer.encode_batch(text.splitlines(keepends=True))]
    )
    result = []
    for start in (0, len(ids) // 2):
        items = []
        for first in range(start, start + WINDOWS * LENGTH, LENGTH):
            part = ids[first : first + LENGTH + 1]
            items.append(Window(part, LENGTH, 1.0, 1.0, 0))
        result.append(
            Windows.of(items, length=LENGTH, tokenizer_digest=tokenizer.digest, packed=True)
        )
    return result


def weight_files(shared: Path, tokenizer: Tokenizer, out: Path) -> dict[str, str]:
    """Counts of the text the checkpoint was trained on, and their squares, as counts files."""
    from tolkit.counts import save_counts

    counts = np.zeros(8192, np.uint64)
    for name in ("novels.train-a", "wiki"):
        packed = (shared / f"data/text/{name}.txt.zst").read_bytes()
        text = zstandard.ZstdDecompressor().decompress(packed).decode().replace("\f", "")
        text = re.sub(r"\n{2,}", "\n", text)
        for ids in tokenizer.encode_batch(text.splitlines(keepends=True)):
            counts += np.bincount(ids, minlength=8192).astype(np.uint64)
    paths = {}
    for name, values in {"counts": counts, "squares": counts**2}.items():
        paths[name] = str(out / f"{name}.safetensors")
        save_counts(Path(paths[name]), values, tokenizer.digest)
    return paths


def main() -> None:
    """Build every bundle, evaluate all of them in one pass a slice, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="methods whose name holds this text")
    arguments = parser.parse_args()
    checkpoint = arguments.shared / "reference"
    if not checkpoint.is_dir():
        print(f"{checkpoint}: not here, nothing measured")
        return
    out = arguments.out or Path(tempfile.mkdtemp(prefix="reference-"))
    out.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(checkpoint)
    weights = weight_files(arguments.shared, tokenizer, out)
    cases: list[tuple[str, Path, Expected]] = []
    options = {"resources": Resources(force=True), "progress": SilentProgress()}
    raw = out / "raw.tol"
    build(checkpoint, raw, dtype="f32", **options)
    for number, (name, (spec, expected)) in enumerate(METHODS.items()):
        path = raw
        if spec is not None:
            path = out / f"method-{number}.tol"
            spec = replace(spec, weights=weights.get(spec.weights, spec.weights))
            compress(checkpoint, path, spec, **options)
        cases.append((name, path, expected))
    drops = [
        (f"layer {i} dropped", DropSpec((i,), fold=False), Expected(p))
        for i, p in enumerate(DROPPED)
    ]
    drops += [(f"layer {i} folded", DropSpec((i,)), Expected(p)) for i, p in enumerate(FOLDED)]
    drops += [(name, spec, expected) for name, (spec, expected) in SETS.items()]
    for number, (name, drop, expected) in enumerate(drops):
        path = out / f"drop-{number}.tol"
        drop_layers(raw, path, drop, **options)
        cases.append((name, path, expected))
    cases = [case for case in cases if arguments.only in case[0]]
    reference = load_runnable(checkpoint)
    per_slice = []
    for windows in slices(arguments.shared, tokenizer):
        rows = []
        for start in range(0, len(cases), 8):  # bundles in memory at a time
            batch = [load_runnable(path) for _, path, _ in cases[start : start + 8]]
            rows += evaluate(batch, reference, windows, progress=SilentProgress())
        per_slice.append(rows)
        base = per_slice[-1][0].reference_metrics["ppl_token"].value
        print(f"reference perplexity of slice {'AB'[len(per_slice) - 1]}: {base:.2f}")
    print("\n| method | b/v | ppl % | README | KL | README | top-1 % | README | agrees |")
    print("|---|---|---|---|---|---|---|---|---|")
    failures = 0
    for i, (name, path, want) in enumerate(cases):
        results = [rows[i].metrics for rows in per_slice]

        def mean(metric: str, results: list = results) -> float:
            return float(np.mean([r[metric].value for r in results]))

        ppl, kl, top1 = (
            100 * mean("ppl_increase"),
            mean("kl_mean_nats"),
            100 * mean("top1_agreement"),
        )
        # The README's own bound: +-0.06 points up to KL .001, +-0.3 beyond .02, linear between.
        bound = float(np.interp(kl, [0.001, 0.02], [0.06, 0.3])) + 0.005 * abs(want.ppl_percent)
        stated = not math.isnan(want.ppl_percent)
        agrees = abs(ppl - want.ppl_percent) <= bound
        failures += stated and not agrees
        verdict = ("yes" if agrees else "NO") if stated else "not stated"
        bits = load_bits(path)
        print(
            f"| {name} | {bits:.3f} | {ppl:+.2f} | {want.ppl_percent:+.2f} | {kl:.5f} | "
            f"{'' if want.kl is None else want.kl} | {top1:.1f} | "
            f"{'' if want.top1 is None else want.top1} | {verdict} |"
        )
    print(f"\n{len(cases) - failures} of {len(cases)} agree; {torch.__version__=}")


def load_bits(path: Path) -> float:
    """True bits per value of a bundle."""
    from tolkit_formats import open_bundle

    return open_bundle(path).bits_per_value


if __name__ == "__main__":
    main()
