"""The whole path once, on text every machine has: train, build, compress, drop, evaluate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolkit.build import build
from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.spec import middle_layers
from tolkit.data import read_documents
from tolkit.data.limit import limited
from tolkit.demo_plot import draw_quality, plots_installed
from tolkit.errors import OutputExistsError
from tolkit.evaluate import EvalResult, evaluate, windows_of
from tolkit.progress import Progress, TqdmProgress
from tolkit.tables import load_runnable
from tolkit.train import TrainSpec, train
from tolkit_formats import files, open_bundle

__all__ = ["DemoReport", "DemoRow", "DemoSpec", "markdown_table", "run_demo"]

_MARKER = "demo.json"
_WINDOW = 128  # what the tiny preset is trained on
_TRAIN_TEXT, _VALID_TEXT = "stdlib:train", "stdlib:valid"


@dataclass(frozen=True)
class DemoSpec:
    """One demo run.

    out: folder for everything; made when missing.
    minutes: for training. limit_tokens: of held-out text.
    threads: None takes every usable CPU. force: replace an earlier demo's results.
    """

    out: Path
    minutes: float = 1.25
    limit_tokens: int = 60_000
    seed: int = 0
    threads: int | None = None
    force: bool = False


@dataclass(frozen=True)
class DemoRow:
    """One way of storing the tables: what it takes and what it costs.

    group: raw, bits, rank, budget or drop. careful: with feedback or folding, the default.
    Quality is against the checkpoint's FFN path; `_se` are standard errors over windows.
    """

    tables: str
    group: str
    careful: bool
    path: Path
    bytes: int
    bits_per_value: float
    ppl_increase: float
    ppl_increase_se: float
    kl_mean_nats: float
    kl_mean_nats_se: float
    top1_agreement: float
    top1_agreement_se: float

    def to_json(self) -> dict[str, Any]:
        """All fields, the path as text."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class DemoReport:
    """The result table, what it was measured on, and where everything is (`files`)."""

    rows: tuple[DemoRow, ...]
    vocab_size: int
    num_layers: int
    hidden_size: int
    valid_tokens: int
    reference_ppl: float
    reference_ppl_se: float
    files: Mapping[str, Path]


@dataclass(frozen=True)
class _Variant:
    name: str
    file: str
    group: str
    careful: bool
    make: Callable[[Path, Path], BundleReport]


def run_demo(spec: DemoSpec, progress: Progress | None = None) -> DemoReport:
    """Train a tiny model, store its tables in ten ways, measure all of them in one pass.

    Raises:
        OutputExistsError: `out` holds a finished demo (and not `force`), or something else.
    """
    progress = progress or TqdmProgress()
    _claim(spec)
    checkpoint = spec.out / "ckpt"
    train(
        TrainSpec(
            out=checkpoint,
            text=(_TRAIN_TEXT,),
            valid_text=(_VALID_TEXT,),
            minutes=spec.minutes,
            seed=spec.seed,
            force=True,
        ),
        progress,
    )
    full = spec.out / "f16.tol"
    variants = _variants(spec, checkpoint, progress)
    bundles = [v.make(full, spec.out / v.file) for v in variants]
    results = _measure(spec, checkpoint, variants, progress)
    rows = tuple(map(_row, variants, bundles, results))
    report = _report(spec, checkpoint, rows, results[0])
    _write_results(spec, report)
    return report


def _claim(spec: DemoSpec) -> None:
    """Make the folder ours; refuse one that holds something else or a finished demo."""
    files.make_dir(spec.out)
    marker = spec.out / _MARKER
    if not marker.exists():
        if any(spec.out.iterdir()):
            raise OutputExistsError(
                f"{spec.out}: holds something else than a demo", hint="choose a new folder with -o"
            )
    elif not spec.force and json.loads(marker.read_text()).get("finished"):
        raise OutputExistsError(
            f"{spec.out}: holds a finished demo", hint="choose another folder, or add --force"
        )
    files.write_atomic(marker, b'{"finished": false}\n')


def _measure(
    spec: DemoSpec, checkpoint: Path, variants: list[_Variant], progress: Progress
) -> list[EvalResult]:
    """All variants beside the FFN path, in one pass over the held-out text."""
    reference = load_runnable(checkpoint)
    documents = limited(read_documents([_VALID_TEXT]), reference.tokenizer, spec.limit_tokens)
    windows = windows_of(documents, reference.tokenizer, _WINDOW)
    return evaluate(
        [load_runnable(spec.out / variant.file) for variant in variants],
        reference,
        windows,
        labels=[variant.name for variant in variants],
        progress=progress,
    )


def _row(variant: _Variant, bundle: BundleReport, result: EvalResult) -> DemoRow:
    ppl, kl = result.metrics["ppl_increase"], result.metrics["kl_mean_nats"]
    top1 = result.metrics["top1_agreement"]
    assert bundle.path is not None
    return DemoRow(
        tables=variant.name,
        group=variant.group,
        careful=variant.careful,
        path=bundle.path,
        bytes=bundle.table_bytes,
        bits_per_value=bundle.bits_per_value,
        ppl_increase=ppl.value,
        ppl_increase_se=ppl.se,
        kl_mean_nats=kl.value,
        kl_mean_nats_se=kl.se,
        top1_agreement=top1.value,
        top1_agreement_se=top1.se,
    )


def _report(
    spec: DemoSpec, checkpoint: Path, rows: tuple[DemoRow, ...], result: EvalResult
) -> DemoReport:
    shape = open_bundle(spec.out / "f16.tol")
    reference = result.reference_metrics["ppl_token"]
    places = {"checkpoint": checkpoint, "bundles": spec.out, "table": spec.out / "results.md"}
    if plots_installed():
        places["picture"] = spec.out / "quality.png"
    return DemoReport(
        rows=rows,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        valid_tokens=result.conditions.n_tokens,
        reference_ppl=reference.value,
        reference_ppl_se=reference.se,
        files=places,
    )


def _write_results(spec: DemoSpec, report: DemoReport) -> None:
    """results.md, demo.json and the picture."""
    files.write_atomic(report.files["table"], markdown_table(report).encode())
    if "picture" in report.files:
        files.write_atomic(report.files["picture"], draw_quality(report.rows))
    content = {"finished": True, "rows": [row.to_json() for row in report.rows]}
    files.write_atomic(spec.out / _MARKER, (json.dumps(content, indent=2) + "\n").encode())


def markdown_table(report: DemoReport) -> str:
    """The result table as the README shows it."""
    lines = [
        "| tables | size | bits/value | perplexity change | KL (nats) | top-1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report.rows:
        lines.append(
            f"| {row.tables} | {row.bytes / 1e6:.2f} MB | {row.bits_per_value:.2f} "
            f"| {_percent(row.ppl_increase)} +/- {_percent(row.ppl_increase_se)} % "
            f"| {row.kl_mean_nats:.2g} +/- {row.kl_mean_nats_se:.1g} "
            f"| {100 * row.top1_agreement:.2f} % |"
        )
    shape = f"{report.vocab_size:,} x {report.num_layers} x {report.hidden_size}"
    return "\n".join(
        [
            *lines,
            "",
            f"Tables of {shape} values (V x L x D); perplexity of the FFN path "
            f"{report.reference_ppl:.2f} +/- {report.reference_ppl_se:.2f} on "
            f"{report.valid_tokens:,} held-out tokens; changes and KL against it, errors over "
            "windows.",
            "",
        ]
    )


def _percent(ratio: float) -> str:
    """Three decimals, and no sign on what rounds to zero."""
    text = f"{100 * ratio:.3f}"
    return "0.000" if float(text) == 0 else text


def _variants(spec: DemoSpec, checkpoint: Path, progress: Progress) -> list[_Variant]:
    resources = Resources(spec.threads, force=True)

    def built(full: Path, path: Path) -> BundleReport:
        return build(checkpoint, path, resources=resources, progress=progress)

    def smaller(**options: Any) -> Callable[[Path, Path], BundleReport]:
        def make(full: Path, path: Path) -> BundleReport:
            wish = CompressSpec(**options)
            return compress(full, path, wish, resources=resources, progress=progress)

        return make

    def thinner(fold: bool) -> Callable[[Path, Path], BundleReport]:
        def make(full: Path, path: Path) -> BundleReport:
            wish = DropSpec(middle_layers(open_bundle(full).layer_ids, 2), fold=fold)
            return drop_layers(full, path, wish, resources=resources, progress=progress)

        return make

    return [
        _Variant("f16", "f16.tol", "raw", True, built),
        _Variant("int8", "int8.tol", "bits", True, smaller(codec="int8")),
        _Variant("nf4", "nf4.tol", "bits", True, smaller(codec="nf4")),
        _Variant(
            "nf4, no feedback",
            "nf4-plain.tol",
            "bits",
            False,
            smaller(codec="nf4", feedback=False),
        ),
        _Variant("rank 50%", "rank50.tol", "rank", True, smaller(rank="50%")),
        _Variant(
            "rank 50% + nf4", "rank50-nf4.tol", "rank", True, smaller(rank="50%", codec="nf4")
        ),
        _Variant("1 bit", "1bit.tol", "budget", True, smaller(bits_per_value=1.0)),
        _Variant("half a bit", "halfbit.tol", "budget", True, smaller(bits_per_value=0.5)),
        _Variant("2 layers folded", "folded.tol", "drop", True, thinner(fold=True)),
        _Variant("2 layers dropped", "dropped.tol", "drop", False, thinner(fold=False)),
    ]
