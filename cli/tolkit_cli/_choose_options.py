"""Options of commands that choose layers by measuring on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tolkit_cli._options import INPUT, TEXT_HELP, WHAT, option

__all__ = [
    "AutoOption",
    "ChooseDataOption",
    "ChooseReferenceOption",
    "MaxKlOption",
    "MaxPplOption",
    "SearchOption",
]

AutoOption = Annotated[
    int | None,
    option(WHAT, "--auto", metavar="N", help="Choose N layers by measuring on --data."),
]
MaxKlOption = Annotated[
    str | None,
    option(
        WHAT,
        "--max-kl",
        metavar="NATS",
        help="Choose as many as keep the mean KL divergence within this.",
    ),
]
MaxPplOption = Annotated[
    str | None,
    option(
        WHAT,
        "--max-ppl-increase",
        metavar="P%",
        help="Choose as many as keep the change of perplexity within this: 0.4%.",
    ),
]
SearchOption = Annotated[
    Literal["forward", "backward", "auto"] | None,
    option(
        WHAT,
        "--search",
        metavar="WAY",
        help="forward adds layers, backward puts them back, auto does both, exchanges neighbours "
        "and takes the best set. [default: auto]",
    ),
]
ChooseDataOption = Annotated[
    list[str] | None,
    option(INPUT, "--data", metavar="TEXT", help=f"To choose on. {TEXT_HELP} Repeatable."),
]
ChooseReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Measure costs against this checkpoint or bundle. [default: the bundle as it is]",
    ),
]
