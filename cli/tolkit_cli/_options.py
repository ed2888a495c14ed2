"""Option and argument types that several commands share: one wording, one group each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = [
    "INPUT",
    "MODEL",
    "OUTPUT",
    "RESOURCES",
    "WHAT",
    "BatchTokensOption",
    "BundleArgument",
    "DataArgument",
    "DeviceOption",
    "DryRunOption",
    "ForceOption",
    "OutOption",
    "RestartOption",
    "SourceArgument",
    "ThreadsOption",
    "option",
]

INPUT = "Input"
MODEL = "Model"
WHAT = "What to do"
OUTPUT = "Output"
RESOURCES = "Resources"

TEXT_HELP = (
    'Text: files, quoted patterns, folders, .jsonl (field "text"), .zst of these; or stdlib, '
    "stdlib:train, stdlib:valid, the sources and manual of this Python."
)


def option(panel: str, *names: str, metavar: str | None = None, help: str, **more: Any) -> Any:
    """typer.Option with its group first, so that declarations read alike."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, **more)


BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A NAME.tol folder.", rich_help_panel=INPUT)
]
SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IN", help="A bundle (NAME.tol) or a checkpoint folder.", rich_help_panel=INPUT
    ),
]
DataArgument = Annotated[
    list[str], typer.Argument(metavar="DATA", help=TEXT_HELP, rich_help_panel=INPUT)
]
OutOption = Annotated[Path, option(OUTPUT, "-o", "--out", metavar="PATH", help="What to write.")]
ForceOption = Annotated[bool, option(OUTPUT, "--force", help="Replace PATH if it exists.")]
RestartOption = Annotated[
    bool,
    option(OUTPUT, "--restart", help="Discard what an interrupted run left; do not continue it."),
]
DryRunOption = Annotated[
    bool,
    option(OUTPUT, "--dry-run", help="Print the plan with predicted bytes; write nothing."),
]
ThreadsOption = Annotated[
    int,
    option(
        RESOURCES,
        "--threads",
        metavar="N",
        min=0,
        help="Blocks worked on at once, 0 = one a core. Changes no bit of the result.",
    ),
]
DeviceOption = Annotated[
    str,
    option(
        RESOURCES,
        "--device",
        metavar="NAME",
        help="auto (CUDA where there is one), cpu, cuda or cuda:N.",
    ),
]
BatchTokensOption = Annotated[
    int | None,
    option(
        RESOURCES,
        "--batch-tokens",
        metavar="N",
        min=1,
        help="Tokens read at once; memory grows with it. [default: 8192, on CUDA 65536]",
    ),
]
ComputeDtype = Literal["float32", "bfloat16", "float16"]
