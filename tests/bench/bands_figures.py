"""Quality of tables filled to a size, beside what this project must reach.

Needs the development data (a trained checkpoint and text, not part of the project):

    python tests/bench/bands_figures.py --shared ../shared [--checkpoint DIR] [--metric FILE]
        [--only TEXT,..] [--out FOLDER]

Counts tokens and measures the readers' metric on training text, compresses the checkpoint to 0.5 to
3 bits a value in every way on offer, evaluates everything over the two slices of the reference
README, and prints a Markdown table: true bits per value, perplexity change, KL and top-1.
`--checkpoint` takes another model with the same tokenizer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from reference_figures import slices

from tolkit.bundling import Resources
from tolkit.calibrate import CalibrationSpec, calibrate, save_metric
from tolkit.compress import CompressSpec, compress
from tolkit.compress.spec import BandsWish
from tolkit.counts import save_counts
from tolkit.data import Tokenizer, count_tokens, read_documents, tokens_of
from tolkit.evaluate import evaluate
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle

# shared/reference/README.md: "feedback + KLT, fixed widths, int8 basis, local Fisher, 8 tiers",
# and for entropy coding the model cost of the rows beside, which no bitstream stood for.
STATED = {
    ("fixed", 3.0): 0.00002,
    ("fixed", 2.0): 0.00008,
    ("fixed", 1.5): 0.00024,
    ("fixed", 1.0): 0.00110,
    ("fixed", 0.7): 0.00366,
    ("entropy", 2.0): 0.00002,
    ("entropy", 1.0): 0.00042,
    ("entropy", 0.5): 0.0048,
}
SIZES = (0.5, 0.6, 0.7, 1.0, 1.5, 2.0, 3.0)


def counts_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """How often each token stands in a text."""
    return count_tokens(tokens_of([text], tokenizer), tokenizer.vocab_size)


def wishes(files: dict[str, str]) -> dict[str, CompressSpec]:
    """Every way to store the tables, by name."""
    prose = {"weights": files["counts"], "calibration": files["metric"]}
    code = {"weights": files["code counts"], "calibration": files["code metric"]}
    result = {"nf4 plain": CompressSpec(codec="nf4", feedback=False)}
    for size in SIZES:
        for coding in ("fixed", "entropy"):
            spec = CompressSpec(bits_per_value=size, coding=coding, **prose)
            result[f"{coding} {size:g}"] = spec
    for coding in ("fixed", "entropy"):
        one = {"bits_per_value": 1.0, "coding": coding}
        result |= {
            f"{coding} 1, no text at all": CompressSpec(**one),
            f"{coding} 1, equal weights, no metric": CompressSpec(weights="none", **one),
            f"{coding} 1, counts alone": CompressSpec(weights=files["counts"], **one),
            f"{coding} 1, metric of code": CompressSpec(
                **one, weights=files["counts"], calibration=files["code metric"]
            ),
            f"{coding} 1, counts and metric of code": CompressSpec(**one, **code),
            f"{coding} 1, no prediction": CompressSpec(
                **one, **prose, bands=BandsWish(predictor_bits=0)
            ),
            f"{coding} 1, no feedback": CompressSpec(**one, **prose, feedback=False),
            f"{coding} 1, Hadamard": CompressSpec(**one, **prose, bands=BandsWish("hadamard")),
        }
    return result


def calibration(checkpoint: Path, data: str, path: Path) -> str:
    """A metric file for `data`."""
    measured = calibrate(
        load_runnable(checkpoint),
        read_documents([data]),
        CalibrationSpec(),
        progress=SilentProgress(),
    )
    save_metric(path, measured)
    return str(path)


def main() -> None:
    """Prepare files, compress, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--metric", help="of novels.train-a, from tol calibrate")
    parser.add_argument("--code-metric", help="of stdlib:train, from tol calibrate")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="methods whose name holds one of these texts")
    arguments = parser.parse_args()
    shared = arguments.shared
    checkpoint = arguments.checkpoint or shared / "reference"
    if not checkpoint.is_dir():
        print(f"{checkpoint}: not here, nothing measured")
        return
    out = arguments.out or Path(tempfile.mkdtemp(prefix="bands-"))
    out.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(checkpoint)
    chosen = [text for text in arguments.only.split(",") if text]
    training = str(shared / "data/text/novels.train-a.txt.zst")
    files = {}
    for name, text in {"counts": training, "code counts": "stdlib:train"}.items():
        files[name] = str(out / f"{name.replace(' ', '-')}.safetensors")
        save_counts(Path(files[name]), counts_of(tokenizer, text), tokenizer.digest)
    files["metric"] = arguments.metric or calibration(
        checkpoint, training, out / "metric.safetensors"
    )
    files["code metric"] = arguments.code_metric or calibration(
        checkpoint, "stdlib:train", out / "code-metric.safetensors"
    )
    cases = []
    for number, (name, spec) in enumerate(wishes(files).items()):
        if chosen and not any(text in name for text in chosen):
            continue
        path = out / f"case-{number}.tol"
        report = compress(
            checkpoint, path, spec, resources=Resources(force=True), progress=SilentProgress()
        )
        cases.append((name, path, report.elapsed_s))
    reference = load_runnable(checkpoint)
    per_slice = []
    for windows in slices(shared, tokenizer):
        rows = []
        for start in range(0, len(cases), 8):
            batch = [load_runnable(path) for _, path, _ in cases[start : start + 8]]
            rows += evaluate(batch, reference, windows, progress=SilentProgress())
        per_slice.append(rows)
    print("| method | b/v | ppl % | KL | +- | stated KL | top-1 % | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for i, (name, path, elapsed_s) in enumerate(cases):
        results = [rows[i].metrics for rows in per_slice]
        ppl, kl, top1 = (
            float(np.mean([r[metric].value for r in results]))
            for metric in ("ppl_increase", "kl_mean_nats", "top1_agreement")
        )
        error = float(np.hypot.reduce([r["kl_mean_nats"].se for r in results])) / len(results)
        coding, _, size = name.partition(" ")
        stated = STATED.get((coding, float(size)), "") if size.replace(".", "").isdigit() else ""
        print(
            f"| {name} | {open_bundle(path).bits_per_value:.4f} | {100 * ppl:+.3f} | {kl:.6f} | "
            f"{error:.6f} | {stated} | {100 * top1:.2f} | {elapsed_s:.0f} |",
            flush=True,
        )
    print(f"\n{torch.__version__=}")


if __name__ == "__main__":
    main()
