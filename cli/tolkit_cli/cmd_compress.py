"""`tol compress`: lower ranks and fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tolkit_cli._command import command
from tolkit_cli._options import (
    WHAT,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
    SourceArgument,
    ThreadsOption,
    option,
)
from tolkit_cli._output import Output
from tolkit_cli._report import show_report

__all__ = ["compress"]

RankOption = Annotated[
    str | None,
    option(
        WHAT,
        "--rank",
        metavar="R",
        help="Truncate: 50%, 1024, or by layers 0-3:1024,4-:256 (others keep full rank).",
    ),
]
BitsOption = Annotated[
    Literal["16", "8", "4"] | None,
    option(
        WHAT,
        "--bits",
        metavar="16|8|4",
        help="Bits of a value: 8 is int8, 4 is nf4. [default: 16]",
    ),
]
CodecOption = Annotated[
    Literal["int8", "int4", "nf4", "fp4", "bands"] | None,
    option(
        WHAT,
        "--codec",
        metavar="NAME",
        help="int8, int4, nf4 or fp4 instead of --bits; bands fills a budget.",
    ),
]
BitsPerValueOption = Annotated[
    float | None,
    option(
        WHAT,
        "--bits-per-value",
        metavar="X",
        help="At most X true bits a value, everything stored counted: codec bands.",
    ),
]
BudgetOption = Annotated[
    str | None,
    option(WHAT, "--budget", metavar="SIZE", help="The same as bytes: 1.5GB, 800MiB, 123456."),
]
CalibrationOption = Annotated[
    Path | None,
    option(
        WHAT,
        "--calibration",
        metavar="FILE",
        help="What errors cost at each layer, from tol calibrate; about halves the loss of bands.",
    ),
]
PredictOption = Annotated[
    str,
    option(
        WHAT,
        "--predict",
        metavar="auto|0|BITS",
        help="Bits of weights that predict rows from embeddings, for bands; 0 predicts nothing.",
    ),
]
HadamardOption = Annotated[
    bool,
    option(WHAT, "--hadamard", help="bands with a fixed rotation instead of a stored basis."),
]
CodingOption = Annotated[
    Literal["fixed", "entropy"],
    option(
        WHAT,
        "--coding",
        metavar="fixed|entropy",
        help="Of bands: records of one length, or entropy-coded ones: a third smaller at equal "
        "loss, slower to read (format 1.1).",
    ),
]
DropOption = Annotated[
    str | None,
    option(
        WHAT,
        "--drop",
        metavar="LAYERS",
        help="Also leave out layers, folded into the next kept one: 3-5,9.",
    ),
]
WeightsOption = Annotated[
    str,
    option(
        WHAT,
        "--weights",
        metavar="auto|none|FILE",
        help="How much a row counts for the ranks: its token counts where known, all alike, or "
        "a file of tol count.",
    ),
]
NoFeedbackOption = Annotated[
    bool,
    option(WHAT, "--no-feedback", help="Do not let a layer make up for what earlier layers lost."),
]


@command(
    "compress",
    stage="Shrink",
    examples=[
        "tol compress full.tol -o small.tol --rank 50% --bits 4",
        "tol compress ckpt -o nf4.tol --bits 4 --dry-run",
    ],
    next_step="tol eval SMALL --reference CKPT --data TEXT, to see what it cost.",
    resumable=True,
)
def compress(
    out: Output,
    source: SourceArgument,
    path: OutOption,
    rank: RankOption = None,
    bits: BitsOption = None,
    codec: CodecOption = None,
    drop: DropOption = None,
    weights: WeightsOption = "auto",
    no_feedback: NoFeedbackOption = False,
    bits_per_value: BitsPerValueOption = None,
    budget: BudgetOption = None,
    calibration: CalibrationOption = None,
    predict: PredictOption = "auto",
    hadamard: HadamardOption = False,
    coding: CodingOption = "fixed",
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    restart: RestartOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Truncate ranks and quantise tables.

    Reads a bundle, or a checkpoint (the full tables are then never written), and writes a new
    bundle; the input is not changed. Sizes: int8 about 8 bits a value, nf4 4.5 with its scales;
    rank 50% halves either and adds a basis. --dry-run predicts the bytes.

    Error feedback is on: each layer is encoded with what earlier ones lost, so the running sum
    stays right at no cost in bytes. An interrupted run is continued by the same command.
    """
    from tolkit.bundling import Resources
    from tolkit.compress import CompressSpec
    from tolkit.compress import compress as compress_tables
    from tolkit.compress.bands import BandsWish
    from tolkit.compress.spec import BITS_TO_CODEC, parse_layers, parse_predict, parse_size
    from tolkit.errors import UsageError
    from tolkit.sources import open_source

    if bits and codec:
        raise UsageError("--bits: give either --bits or --codec, not both")
    out.record("inputs", source=source)
    layers = parse_layers(drop, open_source(source).num_layers, "--drop") if drop else ()
    spec = CompressSpec(
        rank=rank,
        codec=BITS_TO_CODEC[int(bits)] if bits else codec,
        drop=layers,
        feedback=not no_feedback,
        weights=weights,
        bits_per_value=bits_per_value,
        budget_bytes=None if budget is None else parse_size(budget, "--budget"),
        calibration=None if calibration is None else str(calibration),
        bands=BandsWish("hadamard" if hadamard else "klt", parse_predict(predict)),
        coding=coding,
    )
    report = compress_tables(
        source,
        path,
        spec,
        resources=Resources(threads or None, force, restart),
        dry=dry_run,
        progress=out.progress(),
    )
    show_report(out, report)
