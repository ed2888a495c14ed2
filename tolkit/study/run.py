"""Running a study: what is missing is measured, then tables and figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tolkit import ranks
from tolkit.errors import UsageError
from tolkit.progress import Progress, TqdmProgress
from tolkit.study.context import Context
from tolkit.study.fields import Field
from tolkit.study.figure import plots_installed, render
from tolkit.study.registry import study_named
from tolkit.study.report import PAPER_FIELDS, StudyReport, to_csv, to_markdown, with_paper
from tolkit.study.spec import StudySpec
from tolkit.study.store import RESULTS, Point, open_results
from tolkit.study.study import Study
from tolkit.study.task_scores import task_fields, tasks_text
from tolkit_formats import files

__all__ = ["run_study"]

_DEFAULTS = {
    "values": None,
    "against": (),
    "calibration": (),
    "calibration_windows": 128,
    "keep": False,
    "tasks": (),
    "task_data": None,
    "task_limit": None,
}


def run_study(spec: StudySpec, progress: Progress | None = None) -> StudyReport:
    """Measure all points of a study that `spec.out` does not hold yet; write table and figures.

    Equal runs write equal files. Interrupted, the same call goes on where it was.

    Raises:
        UsageError: no such study, values that cannot be had, or options of another study.
        OutputExistsError, MismatchError: `out` holds something else, or other conditions.
        InputError and its kin: model or text are missing or damaged.
        ResourceError: no such device, no room, or another process works in `out`.
    """
    progress = TqdmProgress() if progress is None else progress
    if ranks.world_size() > 1:
        raise UsageError(
            f"study: runs in one process, torchrun started {ranks.world_size()}",
            hint="start it without torchrun",
        )
    study = study_named(spec.study)
    _require_taken(study, spec)
    context = Context(spec, progress)
    keys = study.keys(context)
    fingerprint = study.fingerprint(context)
    with open_results(spec.out, fingerprint, restart=spec.restart) as results:
        missing = [key for key in keys if key not in results]
        for points in study.measure(context, missing):
            results.add(points)
        points = [results[key] for key in keys]
        return _written(study, context, points, len(missing))


def _require_taken(study: Study, spec: StudySpec) -> None:
    """UsageError for an option that this study has no use for."""
    for name, default in _DEFAULTS.items():
        if name not in study.takes and getattr(spec, name) != default:
            raise UsageError(f"{name}: {study.name} has no use for it")


def _written(study: Study, context: Context, points: Sequence[Point], measured: int) -> StudyReport:
    """The report, its files written."""
    spec, progress = context.spec, context.progress
    rows = tuple(with_paper(study.paper, study.fields, point) for point in points)
    places = {name: spec.out / f"{study.name}.{name}" for name in ("csv", "md")}
    places["results"] = spec.out / RESULTS
    if plots_installed():
        places["figure"] = spec.out / f"{study.name}.png"
        places["svg"] = spec.out / f"{study.name}.svg"
    else:
        progress.warn("matplotlib is not installed, no figure is drawn: install tolkit[plots]")
    first = rows[0]
    known = first.get("reference_ppl")
    report = StudyReport(
        study=study,
        model=spec.model,
        rows=rows,
        fields=_shown(study, spec, rows),
        measured_on=_measured_on(spec, first),
        tasks=tasks_text(spec.tasks, first),
        reference=None if known is None else (known, first.get("reference_ppl_se")),
        measured=measured,
        reused=len(points) - measured,
        files=places,
        notes=tuple(study.notes(context, rows)),
    )
    files.write_atomic(places["csv"], to_csv(report).encode())
    files.write_atomic(places["md"], to_markdown(report).encode())
    for name, content in study.appendix(rows).items():
        places[name] = spec.out / f"{study.name}-{name}.csv"
        files.write_atomic(places[name], content.encode())
    if "figure" in places:
        name = spec.model.resolve().name
        footer = f"{name}: {report.notes[0] if report.notes else 'every token counted once'}"
        if report.measured_on:
            footer = f"{name}: {report.measured_on}; bars are 95 % intervals"
        pictures = render(lambda figure: study.draw(figure, rows), study.title, footer)
        files.write_atomic(places["figure"], pictures["png"])
        files.write_atomic(places["svg"], pictures["svg"])
    return report


def _shown(study: Study, spec: StudySpec, rows: Sequence[Point]) -> tuple[Field, ...]:
    """The columns that say something: the study's, tasks, the paper's where it has figures."""
    known = (*study.fields, *task_fields(spec.tasks))
    fields = [f for f in known if any(row.get(f.key) is not None for row in rows)]
    if any(row.get("paper_ppl") is not None for row in rows):
        fields += PAPER_FIELDS
    return tuple(fields)


def _measured_on(spec: StudySpec, point: Point) -> str:
    """Text and n, in words."""
    if "tokens" not in point:
        return ""
    names = ", ".join(Path(text).name for text in spec.data)
    return f"{point['tokens']:,} tokens in {point['windows']:,} windows of {names}"
