"""A picture of quality against size. matplotlib is optional and imported only here."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Protocol

__all__ = ["PlotRow", "draw_quality", "plots_installed"]

_COLOURS = {
    "raw": "#555555",
    "bits": "#1f77b4",
    "rank": "#d95f02",
    "drop": "#2a9d5c",
    "budget": "#8e44ad",
}
_FLOOR = 1e-9  # an exact result has a place on a log axis too
_NAMES = {
    "raw": "16 bits",
    "bits": "fewer bits",
    "rank": "lower rank",
    "drop": "fewer layers",
    "budget": "to a budget",
}


class PlotRow(Protocol):
    """What the picture needs of a result."""

    @property
    def tables(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def careful(self) -> bool: ...
    @property
    def bits_per_value(self) -> float: ...
    @property
    def kl_mean_nats(self) -> float: ...
    @property
    def kl_mean_nats_se(self) -> float: ...


def plots_installed() -> bool:
    """Whether the `plots` extra is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_quality(rows: Sequence[PlotRow]) -> bytes:
    """A PNG: mean KL divergence (log, nats a token, 95 % bars) over bits per value (log)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        divergence = max(row.kl_mean_nats, _FLOOR)
        colour = _COLOURS[row.group]
        axes.errorbar(
            row.bits_per_value,
            divergence,
            yerr=1.96 * row.kl_mean_nats_se,
            fmt="o",
            markersize=8,
            capsize=3,
            color=colour,
            markerfacecolor=colour if row.careful else "white",
            markeredgewidth=1.6,
        )
        axes.annotate(
            row.tables,
            (row.bits_per_value, divergence),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [1, 2, 3, 4, 6, 8, 12, 16]
    shown = [row.bits_per_value for row in rows]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0.85 * min(shown), 1.5 * max(shown))
    divergences = [max(row.kl_mean_nats, _FLOOR) for row in rows]
    axes.set_ylim(0.3 * min(divergences), 5 * max(divergences))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per value of the original tables, all side information counted")
    axes.set_ylabel("KL divergence from the FFN path (nats a token)")
    axes.set_title("Quality against size: lower and further left is better")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS[group], label=_NAMES[group])
        for group in _COLOURS
    ]
    handles.append(
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color="#555555",
            markerfacecolor="white",
            label="without feedback or folding",
        )
    )
    figure.legend(handles=handles, fontsize=9, loc="outside lower center", ncols=5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
