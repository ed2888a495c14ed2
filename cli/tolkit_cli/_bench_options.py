"""Options of `tol bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tolkit_cli._options import INPUT, MODEL, OUTPUT, RESOURCES, TEXT_HELP, WHAT, option

__all__ = [
    "ArchOption",
    "BatchesOption",
    "CacheOption",
    "CodecOption",
    "ColdOption",
    "ContextOption",
    "DataOption",
    "DecodeDtypeOption",
    "DecodeTablesOption",
    "LatencyOption",
    "LayersOption",
    "LimitOption",
    "LookupDtypeOption",
    "LookupMemoryOption",
    "LookupStateOption",
    "LookupTablesOption",
    "ModelsArgument",
    "PolicyOption",
    "PresetOption",
    "RateOption",
    "RepeatsOption",
    "ReplayStateOption",
    "RoundsOption",
    "StepOption",
    "TableMemoryOption",
    "ThreadsOption",
    "TokensOption",
    "VocabOption",
    "WorkOption",
]

ModelsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IN",
        help="Bundles and checkpoints to run as they are; without any, random models.",
        rich_help_panel=INPUT,
    ),
]
PresetOption = Annotated[
    str | None,
    option(
        MODEL,
        "--preset",
        metavar="NAME",
        help="Shape of random models: tiny, 250m, 750m or 1b. [default: IN's, or tiny]",
    ),
]
ArchOption = Annotated[
    str | None,
    option(
        MODEL,
        "--arch",
        metavar="LIST",
        help="Random models to compare: dense, flex-1, flex-2, flex-3, memory. [default: all, or "
        "none beside IN]",
    ),
]
LayersOption = Annotated[
    int | None,
    option(MODEL, "--layers", metavar="N", min=1, help="Layers, if not the preset's."),
]
VocabOption = Annotated[
    int | None,
    option(MODEL, "--vocab-size", metavar="N", min=1, help="Tokens, if not the preset's."),
]
CodecOption = Annotated[
    str,
    option(MODEL, "--codec", metavar="NAME", help="Of random tables: f16, int8 or nf4."),
]
DecodeTablesOption = Annotated[
    str,
    option(
        WHAT,
        "--tables",
        metavar="LIST",
        help="Where rows lie, a run for each: disk, host, device.",
    ),
]
ContextOption = Annotated[
    int,
    option(WHAT, "--context", metavar="N", min=2, help="Positions filled at a round's end."),
]
TokensOption = Annotated[
    int, option(WHAT, "--tokens", metavar="N", min=1, help="Tokens decoded in a round.")
]
RoundsOption = Annotated[
    int,
    option(
        WHAT, "--rounds", metavar="N", min=1, help="Rounds of each model, in turn with the others."
    ),
]
ColdOption = Annotated[
    bool,
    option(
        WHAT, "--cold", help="Put records out of the page cache before each round, and check it."
    ),
]
WorkOption = Annotated[
    Path | None,
    option(
        OUTPUT,
        "--work",
        metavar="DIR",
        help="Keep random tables here for the next time. [default: a temporary folder]",
    ),
]
TableMemoryOption = Annotated[
    str | None,
    option(
        RESOURCES,
        "--max-table-memory",
        metavar="SIZE",
        help="Row cache of tables on disk: 32MiB, 1.5GB. [default: 1 % of the weights, at least "
        "64 records]",
    ),
]
LookupMemoryOption = Annotated[
    str,
    option(
        RESOURCES,
        "--max-table-memory",
        metavar="SIZE",
        help="Row cache of tables on disk, while warm: 32MiB, 1.5GB.",
    ),
]
ThreadsOption = Annotated[
    int,
    option(
        RESOURCES,
        "--threads",
        metavar="N",
        min=0,
        help="Threads of torch's operations, 0 = its own choice.",
    ),
]
DecodeDtypeOption = Annotated[
    str,
    option(
        RESOURCES,
        "--dtype",
        metavar="NAME",
        help="Of weights and activations: float32, bfloat16 or float16.",
    ),
]
BatchesOption = Annotated[
    str | None,
    option(
        WHAT,
        "--batch",
        metavar="LIST",
        help="Tokens a call. [default: those of 1,64,1024,4096 there are rows for]",
    ),
]
LookupTablesOption = Annotated[
    str,
    option(WHAT, "--tables", metavar="LIST", help="Where rows lie: disk, host, device."),
]
LookupStateOption = Annotated[
    str,
    option(
        WHAT,
        "--state",
        metavar="LIST",
        help="Of the page cache, made and checked: cold (before each call), warm.",
    ),
]
RepeatsOption = Annotated[
    int, option(WHAT, "--repeats", metavar="N", min=1, help="Calls of each kind; medians count.")
]
LookupDtypeOption = Annotated[
    str,
    option(RESOURCES, "--dtype", metavar="NAME", help="Of rows: float32, bfloat16 or float16."),
]
DataOption = Annotated[
    list[str], option(INPUT, "--data", metavar="TEXT", help=f"{TEXT_HELP} Repeatable.")
]
CacheOption = Annotated[
    str,
    option(WHAT, "--cache", metavar="LIST", help="Sizes of the row cache, all it takes: 1MB,1GiB."),
]
PolicyOption = Annotated[
    str | None,
    option(
        WHAT,
        "--policy",
        metavar="LIST",
        help="seeded and lru are run as they are; lfu, static and optimal are simulated. "
        "[default: seeded (where counts are known), lru]",
    ),
]
ReplayStateOption = Annotated[
    str,
    option(
        WHAT,
        "--state",
        metavar="LIST",
        help="Of the page cache before a run, made and checked: cold, warm.",
    ),
]
LimitOption = Annotated[
    int | None,
    option(WHAT, "--limit-tokens", metavar="N", min=1, help="Only about the first N tokens."),
]
LatencyOption = Annotated[
    float,
    option(
        WHAT, "--read-us", metavar="US", min=0, help="Disk to predict for: microseconds of a read."
    ),
]
RateOption = Annotated[
    str,
    option(WHAT, "--read-rate", metavar="SIZE", help="Disk to predict for: bytes a second, 2GB."),
]
StepOption = Annotated[
    float,
    option(
        WHAT,
        "--step-ms",
        metavar="MS",
        min=0,
        help="What a token takes besides its row, for the prediction.",
    ),
]
