"""`tol study`: the paper's tables and figures for a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tolkit_cli._command import command
from tolkit_cli._eval_options import (
    DtypeOption,
    LimitOption,
    PackedOption,
    TaskDataOption,
    TaskLimitOption,
    TasksOption,
    WindowOption,
)
from tolkit_cli._options import (
    INPUT,
    OUTPUT,
    TEXT_HELP,
    WHAT,
    BatchTokensOption,
    DeviceOption,
    ThreadsOption,
    option,
)
from tolkit_cli._output import Column, Output

if TYPE_CHECKING:
    from tolkit.study import StudyReport

__all__ = ["study"]

StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="alpha, bits, rank, drop, spectrum, pruning, pareto or decode.",
        rich_help_panel=INPUT,
    ),
]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder (for pruning: the dense one), or a bundle.",
        rich_help_panel=INPUT,
    ),
]
FolderOption = Annotated[
    Path, option(OUTPUT, "-o", "--out", metavar="DIR", help="A folder for everything it makes.")
]
DataOption = Annotated[
    list[str] | None,
    option(
        INPUT,
        "--data",
        metavar="TEXT",
        help=f"{TEXT_HELP} Repeatable; spectrum and decode need none.",
    ),
]
AgainstOption = Annotated[
    list[Path] | None,
    option(
        INPUT,
        "--against",
        metavar="CKPT",
        help="pruning: prune to this checkpoint's active parameters. Repeatable.",
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    option(
        INPUT,
        "--calibration",
        metavar="TEXT|FILE",
        help="pruning: text that wanda and sparsegpt look at, repeatable. pareto: a file of "
        "tol calibrate, for tables filled to a size.",
    ),
]
CalibrationWindowsOption = Annotated[
    int,
    option(
        WHAT,
        "--calibration-windows",
        metavar="N",
        min=1,
        help="pruning: windows of that text.",
    ),
]
ValuesOption = Annotated[
    str | None,
    option(
        WHAT,
        "--values",
        metavar="LIST",
        help="Other points, separated by commas: alphas, codecs, rank cuts in %, layers (3-5,9), "
        "pruning methods, methods or libraries of pareto, or architectures of decode.",
    ),
]
KeepOption = Annotated[
    bool, option(OUTPUT, "--keep", help="bits, rank, pareto: keep the bundles, in DIR/bundles.")
]
RestartOption = Annotated[
    bool, option(OUTPUT, "--restart", help="Discard the points that DIR holds; measure them anew.")
]


@command(
    "study",
    stage="Check",
    examples=[
        "tol study alpha ckpt --data stdlib:valid -o study-alpha --limit-tokens 20000",
        "tol study spectrum ckpt -o study-spectrum",
    ],
    next_step="tol compress with what the study recommends.",
    resumable=True,
)
def study(
    out: Output,
    study: StudyArgument,
    model: ModelArgument,
    path: FolderOption,
    data: DataOption = None,
    against: AgainstOption = None,
    calibration: CalibrationOption = None,
    task_data: TaskDataOption = None,
    values: ValuesOption = None,
    tasks: TasksOption = None,
    task_limit: TaskLimitOption = None,
    calibration_windows: CalibrationWindowsOption = 128,
    window: WindowOption = None,
    packed: PackedOption = False,
    limit_tokens: LimitOption = None,
    keep: KeepOption = False,
    restart: RestartOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_tokens: BatchTokensOption = None,
    threads: ThreadsOption = 0,
) -> None:
    """Repeat a table or figure of the paper for your model.

    alpha: tables scaled down (Table 1). bits: fewer bits a value (Table 7). rank: lower ranks
    (Table 8). drop: one layer left out (Figures 4, 12). spectrum: singular values of each table
    (Figure 13). pruning: a dense model pruned to the active size of memory models (Figure 11).
    pareto: quality against size, beside formats of other libraries and the Gaussian bound; its
    own table takes 4 V L D bytes of disk meanwhile (pip install 'tolkit[peers]' for all of them).
    decode: time and memory of a token, with random weights of the model's shape (Table 6).

    Reads the model and text; writes DIR/STUDY.csv, .md, .png and .svg with standard errors, n and
    the paper's own figures beside. Takes about one forward pass a point. Points are kept in
    DIR/results.jsonl, so the same command continues an interrupted study and adds points to a
    finished one.
    """
    from tolkit.study import StudySpec, run_study

    spec = StudySpec(
        study=study,
        model=model,
        out=path,
        data=tuple(data or ()),
        values=values,
        against=tuple(against or ()),
        calibration=tuple(calibration or ()),
        calibration_windows=calibration_windows,
        window=window,
        packed=packed,
        limit_tokens=limit_tokens,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        threads=threads or None,
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        task_data=task_data,
        task_limit=task_limit,
        keep=keep,
        restart=restart,
    )
    out.record("inputs", study=study, model=model, data=data)
    with out.timing("study"):
        report = run_study(spec, out.progress())
    _show(out, report)


def _show(out: Output, report: StudyReport) -> None:
    """Conditions, the table with the paper's figures beside, and where everything is."""
    from tolkit.study.paper import MODEL, SOURCE

    first = report.rows[0]
    if report.reference is not None:
        out.field("metrics", "tokens", first["tokens"], "text", report.measured_on)
        ppl = f"{report.reference_text} as it is"
        out.field("metrics", "reference_ppl", report.reference[0], "perplexity", ppl)
        out.record("metrics", reference_ppl_se=report.reference[1], windows=first["windows"])
    if report.tasks:
        out.text(f"{'tasks':<20}  {report.tasks} as it is")
    reused = f"{report.measured} measured, {report.reused} taken from an earlier run"
    out.field("metrics", "measured", report.measured, "points", reused)
    out.record("metrics", reused=report.reused)
    out.text()
    leading = next(i for i, f in enumerate(report.fields) if f.kind not in _NAMING)
    rows = [_row(report, row) for row in report.rows]
    out.table("points", _columns(out, report), rows, leading=max(1, leading))
    out.text()
    paper = report.study.paper
    place = f"{SOURCE}, {paper.place}, {MODEL}"
    out.text(f"The paper ({place}{f', {paper.text}' if paper.text else ''}): {paper.says}.")
    out.text("Another model and other text: shapes compare, values do not.")
    out.text()
    if report.notes:
        out.record("metrics", notes=report.notes)
        for note in report.notes:
            out.text(note)
        out.text()
    for name, file in report.files.items():
        out.field("outputs", name, file)
    out.quiet_value(report.files["md"])


_NAMING = ("text", "count", "exact")  # kinds of the columns that say which point it is


def _columns(out: Output, report: StudyReport) -> list[Column]:
    """Each field; its standard error behind it for people, in a column of its own elsewhere."""
    from tolkit.study.fields import se_key

    columns = []
    for field in report.fields:
        columns.append(
            Column(field.key, field.title, right=field.kind != "text", human=f"{field.key}_text")
        )
        if field.with_se and out.mode != "human":
            columns.append(Column(se_key(field), ""))
    return columns


def _row(report: StudyReport, row: Any) -> dict[str, Any]:
    from tolkit.study.fields import cell_text, se_key

    found = dict(row)
    for field in report.fields:
        text = cell_text(field, row)
        if field.with_se and text != "-":
            text = f"{text.removesuffix(' %')} +-{cell_text(field, row, se_key(field))}"
        found[f"{field.key}_text"] = text
    return found
