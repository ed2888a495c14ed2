"""What a study found, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tolkit.study.fields import Field, cell_text, se_key
from tolkit.study.paper import MODEL, SOURCE, Paper
from tolkit.study.store import Point
from tolkit.study.study import Study

__all__ = ["PAPER_FIELDS", "StudyReport", "to_csv", "to_markdown", "with_paper"]

PAPER_FIELDS = (
    Field("paper_ppl", "paper ppl", "exact"),
    Field("paper_change", "paper change", "change"),
)


@dataclass(frozen=True)
class StudyReport:
    """A finished study.

    rows: its points in order, the paper's figure beside (paper_ppl, paper_change) where it has one.
    fields: the columns to show.
    model: as the user named it.
    measured_on: what on, with n, in words; empty for a study that needs no text.
    tasks: what the model as it is scores on the tasks, with n; empty without any.
    reference: (perplexity, standard error) of the model as it is; None without text.
    measured, reused: points of this run, and those taken over from an earlier one.
    files: what was written.
    notes: sentences on what the table cannot show.
    """

    study: Study
    model: Path
    rows: tuple[Point, ...]
    fields: tuple[Field, ...]
    measured_on: str
    tasks: str
    reference: tuple[float, float | None] | None
    measured: int
    reused: int
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def reference_text(self) -> str:
        """The model as it is: perplexity with its standard error."""
        if self.reference is None:
            return ""
        value, se = self.reference
        return f"{value:.2f}" if se is None else f"{value:.2f} +/- {se:.2f}"


def with_paper(paper: Paper, fields: Sequence[Field], point: Point) -> Point:
    """The point with the paper's perplexity for the same value of the first column.

    The paper compresses plainly, so points with error feedback have none beside them.
    """
    value = point.get(fields[0].key)
    if not paper.ppl or point.get("mode", "plain") != "plain":
        return point
    assert isinstance(value, (int, float))
    return {**point, "paper_ppl": paper.ppl.get(value), "paper_change": paper.change(value)}


def to_csv(report: StudyReport) -> str:
    """One line a point, unrounded; standard errors and n in columns of their own."""
    keys: list[str] = ["key"]
    for field in report.fields:
        keys += [field.key, se_key(field)] if field.with_se else [field.key]
    if report.reference is not None:
        keys += ["reference_ppl", "reference_ppl_se", "tokens", "windows"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.rows)
    return buffer.getvalue()


def to_markdown(report: StudyReport) -> str:
    """The page of a study: table, conditions, figure, and what the paper has."""
    study = report.study
    parts = [f"# {study.title}", study.about]
    parts.append(_table([f.title for f in report.fields], [_cells(report, r) for r in report.rows]))
    if report.measured_on:
        parts.append(
            f"Measured on {report.measured_on}. The model as it is: perplexity "
            f"{report.reference_text}; changes, KL divergence and top-1 agreement are against it, "
            "on the same tokens. +/- is one standard error over windows."
        )
    if report.tasks:
        parts.append(
            f"Tasks, the model as it is: {report.tasks}. Accuracy unless named otherwise; +/- is "
            "one standard error over items."
        )
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    if "figure" in report.files:
        parts.append(f"![{study.title}]({report.files['figure'].name})")
    parts.append(_paper_part(study.paper))
    return "\n\n".join(parts) + "\n"


def _cells(report: StudyReport, row: Point) -> list[str]:
    cells = []
    for field in report.fields:
        text = cell_text(field, row)
        if field.with_se and text != "-":
            text += f" +/- {cell_text(field, row, se_key(field))}"
        cells.append(text)
    return cells


def _paper_part(paper: Paper) -> str:
    text = f" on {paper.text}" if paper.text else ""
    head = f"The paper ({SOURCE}, {paper.place}), {MODEL}{text}: {paper.says}. "
    head += "Another model and other text: shapes compare, values do not."
    if not paper.rows:
        return f"## The paper\n\n{head}"
    return f"## The paper\n\n{head}\n\n{_table(paper.columns, paper.rows)}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---:"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
