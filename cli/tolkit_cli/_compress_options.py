"""Options that say what a compression does; `tol compress` and `tol plan` share some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tolkit_cli._options import INPUT, TEXT_HELP, WHAT, option

__all__ = [
    "BitsOption",
    "BitsPerValueOption",
    "BoundKlOption",
    "BoundPplOption",
    "BudgetOption",
    "CalibrationOption",
    "CodecOption",
    "CodingOption",
    "DropOption",
    "HadamardOption",
    "JudgeDataOption",
    "JudgeReferenceOption",
    "KeepRowsOption",
    "MeasuredOption",
    "NoFeedbackOption",
    "PredictOption",
    "RankOption",
    "WeightsOption",
]

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
BoundKlOption = Annotated[
    str | None,
    option(
        WHAT,
        "--max-kl",
        metavar="NATS",
        help="As small as keeps the measured mean KL divergence within this: codec bands.",
    ),
]
BoundPplOption = Annotated[
    str | None,
    option(
        WHAT,
        "--max-ppl-increase",
        metavar="P%",
        help="As small as keeps the measured change of perplexity within this: 0.4%.",
    ),
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
        help="Of bands: records of one length, or entropy-coded ones: smaller at equal loss, "
        "slower to read (format 1.1).",
    ),
]
DropOption = Annotated[
    str | None,
    option(
        WHAT,
        "--drop",
        metavar="LAYERS",
        help="Also leave out layers, folded into a kept neighbour: 3-5,9; or auto:N to choose N "
        "by measuring on --data, auto to try how many pay at this size.",
    ),
]
KeepRowsOption = Annotated[
    str | None,
    option(
        WHAT,
        "--keep-rows",
        metavar="N|P%",
        help="Store only the N most frequent tokens, or P % of all; the others' rows are computed "
        "from FFN weights kept beside (format 1.2).",
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
JudgeDataOption = Annotated[
    list[str] | None,
    option(INPUT, "--data", metavar="TEXT", help=f"To measure on. {TEXT_HELP} Repeatable."),
]
JudgeReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Measure against this checkpoint or bundle. [default: what is compressed]",
    ),
]
MeasuredOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--measured",
        metavar="FILE",
        help="Measurements of tol measure; those that fit are not made again.",
    ),
]
