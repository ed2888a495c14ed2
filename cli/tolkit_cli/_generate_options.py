"""Options of `tol generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tolkit_cli._options import INPUT, OUTPUT, RESOURCES, WHAT, option

__all__ = [
    "BatchOption",
    "ContextOption",
    "DtypeOption",
    "ForceOption",
    "IgnoreEosOption",
    "MaxNewTokensOption",
    "MaxTableMemoryOption",
    "MinPOption",
    "ModelArgument",
    "PenaltyOption",
    "PromptOption",
    "PromptsOption",
    "ResultsOption",
    "SeedOption",
    "StopOption",
    "TablesOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
]

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IN", help="A bundle (NAME.tol) or a checkpoint folder.", rich_help_panel=INPUT
    ),
]
PromptOption = Annotated[
    list[str] | None,
    option(INPUT, "-p", "--prompt", metavar="TEXT", help="Text to continue. Repeatable."),
]
PromptsOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--prompts",
        metavar="FILE",
        help='Texts to continue: .jsonl (field "prompt"), else one a line; - is standard input.',
    ),
]
ResultsOption = Annotated[
    Path | None,
    option(
        OUTPUT,
        "-o",
        "--out",
        metavar="FILE",
        help="Write one JSON object a prompt, a line each, instead of the texts to stdout.",
    ),
]
ForceOption = Annotated[bool, option(OUTPUT, "--force", help="Replace FILE if it exists.")]
MaxNewTokensOption = Annotated[
    int | None,
    option(
        WHAT,
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="End after N tokens. [default: 128, or what the model's positions leave]",
    ),
]
TemperatureOption = Annotated[
    float | None,
    option(
        WHAT,
        "--temperature",
        metavar="T",
        min=0,
        help="Divide scores by T; 0 takes the likeliest token. [default: 0, or 1 with --top-k, "
        "--top-p or --min-p]",
    ),
]
TopKOption = Annotated[
    int | None,
    option(WHAT, "--top-k", metavar="K", min=0, help="Choose among the K likeliest tokens."),
]
TopPOption = Annotated[
    float | None,
    option(
        WHAT,
        "--top-p",
        metavar="P",
        help="Choose among the likeliest tokens that together reach probability P.",
    ),
]
MinPOption = Annotated[
    float | None,
    option(
        WHAT,
        "--min-p",
        metavar="P",
        help="Choose among tokens at least P times as probable as the likeliest.",
    ),
]
PenaltyOption = Annotated[
    float,
    option(
        WHAT,
        "--repetition-penalty",
        metavar="R",
        help="Above 1 makes tokens seen before less likely; 1 does nothing.",
    ),
]
SeedOption = Annotated[
    int,
    option(
        WHAT,
        "--seed",
        metavar="N",
        min=0,
        help="Of the draws; the same seed gives a prompt the same text in any batch.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    option(WHAT, "--stop", metavar="TEXT", help="End before this text. Repeatable."),
]
IgnoreEosOption = Annotated[
    bool, option(WHAT, "--ignore-eos", help="Go on after the end-of-text token.")
]
ContextOption = Annotated[
    int | None,
    option(
        RESOURCES,
        "--context",
        metavar="N",
        min=2,
        help="Positions kept of each text; it ends when they are full. [default: what prompt and "
        "new tokens need]",
    ),
]
BatchOption = Annotated[
    int, option(RESOURCES, "--batch", metavar="N", min=1, help="Prompts decoded together.")
]
TablesOption = Annotated[
    Literal["disk", "host", "device"] | None,
    option(
        RESOURCES,
        "--tables",
        metavar="PLACE",
        help="Where a bundle's rows come from: disk (read as needed), host (all in memory) or "
        "device (all on it), compressed. [default: disk]",
    ),
]
MaxTableMemoryOption = Annotated[
    str | None,
    option(
        RESOURCES,
        "--max-table-memory",
        metavar="SIZE",
        help="Most memory the tables may take: 64MiB, 1.5GB.",
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option(
        RESOURCES,
        "--dtype",
        metavar="NAME",
        help="Of weights and activations: float32, bfloat16 or float16. [default: as stored]",
    ),
]
