"""Options of `tol eval`, and those that `tol study` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tolkit_cli._options import INPUT, OUTPUT, RESOURCES, TEXT_HELP, WHAT, ComputeDtype, option

__all__ = [
    "AlphaOption",
    "BaselineOption",
    "DataOption",
    "DtypeOption",
    "ForceReportsOption",
    "GateOption",
    "GatesOption",
    "HarnessOption",
    "JsonOutOption",
    "JunitOption",
    "LimitOption",
    "MarkdownOption",
    "ModelArgument",
    "OtherReferenceOption",
    "PackedOption",
    "PrefixOption",
    "ReferenceOption",
    "TablesOption",
    "TaskDataOption",
    "TaskLimitOption",
    "TasksOption",
    "UndecidedOption",
    "WindowOption",
]

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A bundle (NAME.tol) or a checkpoint folder.", rich_help_panel=INPUT
    ),
]
DataOption = Annotated[
    list[str] | None,
    option(INPUT, "--data", metavar="TEXT", help=f"{TEXT_HELP} Repeatable."),
]
TasksOption = Annotated[
    str | None,
    option(
        WHAT,
        "--tasks",
        metavar="LIST",
        help="Score tasks as well, separated by commas: lambada, siqa, arc_easy, hellaswag, "
        "winogrande, boolq, piqa, openbookqa, wikitext.",
    ),
]
TaskDataOption = Annotated[
    Path | None,
    option(INPUT, "--task-data", metavar="DIR", help="Their files, in DIR/TASK/."),
]
TaskLimitOption = Annotated[
    int | None,
    option(WHAT, "--task-limit", metavar="N", min=1, help="Only the first N items of each task."),
]
HarnessOption = Annotated[
    str | None,
    option(
        WHAT,
        "--lm-eval",
        metavar="LIST",
        help="Run tasks of lm-evaluation-harness, separated by commas (needs tolkit[lm-eval]; "
        "--task-data may hold task files of your own, which may run code).",
    ),
]
AlphaOption = Annotated[
    float,
    option(
        WHAT,
        "--alpha",
        metavar="A",
        help="Multiply all table rows by A; with another than 1 nothing is recorded.",
    ),
]
ReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Compare with this checkpoint (its FFN path) or bundle. Without it: perplexity only.",
    ),
]
OtherReferenceOption = Annotated[
    bool,
    option(INPUT, "--other-reference", help="Allow a reference the tables were not built from."),
]
GateOption = Annotated[
    list[str] | None,
    option(
        WHAT,
        "--gate",
        metavar="COND",
        help="Condition to meet: ppl_increase<=0.5%, kl_mean<=0.01, top1_agreement>=97%, "
        "bytes<=1.6GB, ppl_token<=baseline+0.5%, piqa.acc>=55%. Repeatable.",
    ),
]
GatesOption = Annotated[
    Path | None, option(WHAT, "--gates", metavar="FILE", help="Conditions in TOML.")
]
BaselineOption = Annotated[
    str | None,
    option(
        INPUT,
        "--baseline",
        metavar="FILE",
        help="Earlier evaluation to compare with: a quality.jsonl, or a bundle that holds one; "
        "FILE#IDENTITY picks a bundle's record. For gates as ppl_token<=baseline+0.5%.",
    ),
]
UndecidedOption = Annotated[
    bool,
    option(
        WHAT, "--allow-undecided", help="A gate inside the measurement's error passes, not fails."
    ),
]
WindowOption = Annotated[
    int | None,
    option(
        WHAT, "--window", metavar="N", min=1, help="Tokens of a window. [default: the model's most]"
    ),
]
PackedOption = Annotated[
    bool, option(WHAT, "--packed", help="Join documents with <eos> before cutting windows.")
]
LimitOption = Annotated[
    int | None,
    option(WHAT, "--limit-tokens", metavar="N", min=1, help="Stop after about N tokens of text."),
]
DtypeOption = Annotated[
    ComputeDtype,
    option(
        RESOURCES,
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16; below float32 its noise floor is reported.",
    ),
]
PrefixOption = Annotated[
    Literal["eos", "bos", "none"],
    option(
        WHAT,
        "--prefix",
        metavar="TOKEN",
        help="Put before each document: eos, bos or none. A tokenizer without it starts bare.",
    ),
]
TablesOption = Annotated[
    Literal["auto", "resident", "streamed"],
    option(
        RESOURCES,
        "--tables",
        metavar="PLACE",
        help="Table rows: streamed (decoded batch by batch), resident (all, on the device) or "
        "auto (resident on CUDA where they fit).",
    ),
]
JsonOutOption = Annotated[
    Path | None, option(OUTPUT, "--json-out", metavar="FILE", help="Also write the JSON report.")
]
JunitOption = Annotated[
    Path | None, option(OUTPUT, "--junit", metavar="FILE", help="Also write JUnit XML.")
]
ForceReportsOption = Annotated[
    bool, option(OUTPUT, "--force", help="Replace report files that exist.")
]
MarkdownOption = Annotated[
    Path | None, option(OUTPUT, "--markdown", metavar="FILE", help="Also write Markdown.")
]
