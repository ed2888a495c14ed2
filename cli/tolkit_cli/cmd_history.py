"""`tol history`: quality along a bundle's lineage, without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tolkit_cli._command import command
from tolkit_cli._options import INPUT, OUTPUT, WHAT, BundleArgument, option
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, number_text, percent_text

if TYPE_CHECKING:
    from tolkit.history import Lineage, Step

__all__ = ["history"]

SearchOption = Annotated[
    list[Path] | None,
    option(INPUT, "--search", metavar="DIR", help="Look for ancestors here too. Repeatable."),
]
TextOption = Annotated[
    str | None,
    option(
        WHAT,
        "--text",
        metavar="DIGEST",
        help="Records on the text whose digest begins so. [default: the most measured text]",
    ),
]
PlotOption = Annotated[
    Path | None,
    option(OUTPUT, "--plot", metavar="FILE", help="Also draw it, as .png or .svg (plots extra)."),
]
ForceOption = Annotated[bool, option(OUTPUT, "--force", help="Replace FILE if it exists.")]

_METRICS = {
    "ppl_token": "ppl",
    "ppl_increase": "change, %",
    "kl_mean_nats": "KL, nats",
    "top1_agreement": "top-1, %",
}


@command(
    "history",
    stage="Check",
    examples=["tol history small.tol", "tol history small.tol --json"],
    next_step="tol eval of a step that has no figures yet, with the same text.",
)
def history(
    out: Output,
    bundle: BundleArgument,
    search: SearchOption = None,
    text: TextOption = None,
    plot: PlotOption = None,
    force: ForceOption = False,
) -> None:
    """Show what each step to a bundle cost in quality.

    Reads the bundle's history, and the evaluation records (quality.jsonl) that tol eval left in
    it and in its ancestors, which are looked for beside it and under --search. Needs no torch
    and less than a second. Writes nothing but the picture, if you ask for one.

    All figures of a table are of one text, one window length and one reference; what was measured
    otherwise is named and left out.
    """
    from tolkit.history import history_of

    if plot is not None:
        _require_drawable(plot, force)
    out.record("inputs", bundle=bundle, search=search or [])
    found = history_of(bundle, search or (), text)
    for note in found.notes:
        out.warn(note)
    if found.setting is not None:
        digest, reference = found.setting.text_digest, found.setting.reference
        length = found.setting.window_length
        out.field("metrics", "text_digest", digest, "text", f"{digest[:12]}, windows of {length}")
        out.record("metrics", window_length=length, reference=reference)
        if reference is not None:
            out.text(f"{'reference':<20}  {_reference_text(found)}")
        out.text()
    rows = [_row(i, step) for i, step in enumerate(found.steps, 1)]
    for columns in _tables(out):
        out.table("steps", columns, rows)
        out.text()
    out.record("metrics", steps=[{c.key: row.get(c.key) for c in _ALL} for row in rows])
    if plot is not None:
        _draw(found, plot)
        out.field("outputs", "plot", plot, "picture")
    last = found.steps[-1].record
    out.quiet_value(last.metrics["ppl_token"].value if last else None)


_MADE = (
    Column("step", "#"),
    Column("command", "command", right=False),
    Column("options", "options", right=False),
    Column("identity", "identity", lambda identity: str(identity)[:12], right=False),
    Column("path", "found", human="path_text", right=False),
)
_SIZES = (
    Column("bytes", "size", bytes_text),
    Column("bits_per_value", "b/v", lambda bits: f"{bits:.2f}"),
)
_QUALITY = tuple(Column(name, title, human=f"{name}_text") for name, title in _METRICS.items())
_ERRORS = tuple(Column(f"{name}_se", "") for name in _METRICS)
_ALL = (*_MADE, *_SIZES, *_QUALITY, *_ERRORS)


def _tables(out: Output) -> list[tuple[Column, ...]]:
    """For people two narrow tables, an error behind each value; elsewhere one with all columns."""
    return [_MADE, (_MADE[0], *_SIZES, *_QUALITY)] if out.mode == "human" else [_ALL]


def _row(index: int, step: Step) -> dict[str, Any]:
    from tolkit.history import options_text

    row: dict[str, Any] = {
        "step": index,
        "command": step.command,
        "options": options_text(step.options),
        "identity": step.identity,
        "bytes": step.table_bytes,
        "bits_per_value": step.bits_per_value,
        "path": "" if step.path is None else str(step.path),
        "path_text": "not here" if step.path is None else step.path.name,
    }
    for name in _METRICS:
        metric = None if step.record is None else step.record.metrics.get(name)
        if metric is not None:
            value, se = metric.value, metric.se
            row |= {name: value, f"{name}_se": se, f"{name}_text": _shown(name, value, se)}
    return row


def _shown(name: str, value: float, se: float) -> str:
    if name in ("ppl_increase", "top1_agreement"):
        text = percent_text(value, 2, signed=name == "ppl_increase").removesuffix(" %")
        error = f"{100 * se:.2f}"
    elif name == "kl_mean_nats":
        text, error = f"{value:.2e}", f"{se:.0e}"
    else:
        text, error = f"{value:.2f}", f"{se:.2f}"
    return f"{text} +-{error}" if math.isfinite(se) else text


def _reference_text(found: Lineage) -> str:
    """Identity and perplexity of what the steps were compared with."""
    for step in reversed(found.steps):
        metric = None if step.record is None else step.record.reference_metrics.get("ppl_token")
        if metric is not None and step.record is not None:
            reference = step.record.setting.reference or ""
            return f"{reference[:12]}, ppl {number_text(metric.value)}"
    return "none"


def _require_drawable(plot: Path, force: bool) -> None:
    import importlib.util

    from tolkit.errors import OutputExistsError, ResourceError, UsageError

    if plot.suffix not in (".png", ".svg"):
        raise UsageError(f"plot: {plot}: expected a name ending in .png or .svg")
    if not plot.absolute().parent.is_dir():
        raise UsageError(f"plot: {plot.parent}: no such folder")
    if plot.exists() and not force:
        raise OutputExistsError(
            f"{plot}: already exists", hint="choose another name, or add --force"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ResourceError("plot: matplotlib is not installed", hint="pip install 'tolkit[plots]'")


def _draw(found: Lineage, plot: Path) -> None:
    from tolkit.history_plot import draw_history
    from tolkit_formats.files import write_atomic

    write_atomic(plot, draw_history(found, "svg" if plot.suffix == ".svg" else "png"))
