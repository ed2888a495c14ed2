"""One look for all figures of a study. matplotlib is optional and imported only here.

Sizes are chosen for a page that shows the figure about 800 pixels wide. Bars are 95 % intervals.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tolkit.study.store import Point

__all__ = [
    "CAREFUL",
    "COLOURS",
    "OURS",
    "PAPER",
    "PLAIN",
    "log_floor",
    "panel",
    "per_cent_ticks",
    "plain_ticks",
    "plots_installed",
    "render",
    "whole_ticks",
    "with_errors",
]

COLOURS = ("#1f77b4", "#d95f02", "#2a9d5c", "#7b4ea3", "#b8860b", "#555555")
OURS: Mapping[str, Any] = {"color": COLOURS[0], "marker": "o"}
CAREFUL: Mapping[str, Any] = {"color": COLOURS[0], "marker": "o"}
PLAIN: Mapping[str, Any] = {"color": COLOURS[1], "marker": "s", "markerfacecolor": "white"}
PAPER: Mapping[str, Any] = {
    "color": "#888888",
    "marker": "x",
    "linestyle": "--",
    "linewidth": 1.2,
    "markersize": 5,
}
_LOOK: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.fontsize": 10,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "svg.hashsalt": "tolkit",
    "svg.fonttype": "path",
}


def plots_installed() -> bool:
    """Whether the `plots` extra is there."""
    return importlib.util.find_spec("matplotlib") is not None


def render(draw: Any, title: str, footer: str) -> dict[str, bytes]:
    """A figure as ``png`` and ``svg``; equal bytes for equal content.

    Args:
        draw: called with the matplotlib figure, to fill it.
        footer: a small line below: what it was measured on.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(_LOOK)):
        figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=13)
        figure.supxlabel(footer, fontsize=8, color="#666666")
        draw(figure)
        found = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            found[kind] = buffer.getvalue()
    return found


def panel(figure: Any, x_label: str, y_label: str, place: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """Labelled axes at a place of the figure's grid."""
    axes = figure.add_subplot(*place)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return axes


def with_errors(
    axes: Any,
    rows: Sequence[Point],
    x: str,
    y: str,
    se: str,
    style: Mapping[str, Any],
    label: str,
) -> None:
    """A line through the rows that have a value, with 95 % bars where there is an error."""
    known = [row for row in rows if row.get(y) is not None]
    axes.errorbar(
        [row[x] for row in known],
        [row[y] for row in known],
        yerr=[1.96 * (row.get(se) or 0.0) for row in known],
        capsize=3,
        label=label,
        **style,
    )


def log_floor(rows: Sequence[Point], key: str) -> list[Point]:
    """Rows that have a value, those of zero raised to a tenth of the smallest, for a log axis."""
    known = [row for row in rows if row.get(key) is not None]
    positive = [row[key] for row in known if row[key] > 0]
    floor = min(positive) / 10 if positive else 1e-9
    return [{**row, key: max(row[key], floor)} for row in known]


def plain_ticks(axis: Any) -> None:
    """Numbers written out on a log axis."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def per_cent_ticks(axis: Any) -> None:
    """Ratios as percentages."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def whole_ticks(axis: Any) -> None:
    """Only whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
