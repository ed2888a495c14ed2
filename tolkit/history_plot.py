"""A picture of a lineage: size and quality after each step. matplotlib is imported only here."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from tolkit.history import Lineage, Step, options_text

if TYPE_CHECKING:
    from tolkit.quality_log import RecordedMetric

__all__ = ["draw_history"]

_BLUE, _ORANGE, _GREY = "#1f77b4", "#d95f02", "#dddddd"
_LABEL_CHARACTERS = 26


def draw_history(lineage: Lineage, form: Literal["png", "svg"]) -> bytes:
    """A PNG or SVG: tables' bits per value, and the loss with 95 % intervals, step by step.

    The loss is the increase of perplexity where a reference was given, else perplexity. Steps
    that were not measured have a place and no point. Equal lineages give equal bytes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = lineage.steps
    width = max(5.0, 2.0 + 1.6 * len(steps))
    with mpl.rc_context({"svg.hashsalt": "tolkit", "svg.fonttype": "path"}):
        figure = Figure(figsize=(width, 6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_sizes(above, steps)
        _draw_loss(below, steps)
        below.set_xticks(range(len(steps)), [_label(i, step) for i, step in enumerate(steps)])
        below.set_xlim(-0.6, len(steps) - 0.4)
        below.tick_params(axis="x", labelsize=9)
        buffer = io.BytesIO()
        metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
        figure.savefig(buffer, format=form, metadata=metadata)
    return buffer.getvalue()


def _draw_sizes(axes: Any, steps: Sequence[Step]) -> None:
    sizes = [(i, s.bits_per_value) for i, s in enumerate(steps) if s.bits_per_value is not None]
    bars = axes.bar([i for i, _ in sizes], [bits for _, bits in sizes], width=0.5, color=_BLUE)
    axes.bar_label(bars, [f"{bits:.2f}" for _, bits in sizes], padding=2, fontsize=9)
    axes.margins(y=0.15)
    axes.set_ylabel("bits per value")
    axes.set_title("Size and quality along the lineage", fontsize=11)
    _dress(axes)


def _draw_loss(axes: Any, steps: Sequence[Step]) -> None:
    compared = any(_metric(step, "ppl_increase") is not None for step in steps)
    name, scale = ("ppl_increase", 100.0) if compared else ("ppl_token", 1.0)
    points = [
        (i, metric) for i, step in enumerate(steps) if (metric := _metric(step, name)) is not None
    ]
    places, values = [i for i, _ in points], [scale * m.value for _, m in points]
    reaches = [
        [scale * _reach(m.value - m.low) for _, m in points],
        [scale * _reach(m.high - m.value) for _, m in points],
    ]
    if points:
        axes.errorbar(
            places, values, yerr=reaches, fmt="o-", color=_ORANGE, capsize=4, markersize=6
        )
    for place, value in zip(places, values, strict=True):
        text = f"{value:+.3g} %" if compared else f"{value:.4g}"
        axes.annotate(text, (place, value), xytext=(8, 4), textcoords="offset points", fontsize=9)
    if compared:
        axes.axhline(0, color="#888888", linewidth=0.8)
    axes.margins(y=0.2)
    axes.set_ylabel("perplexity increase, %" if compared else "perplexity a token")
    _dress(axes)


def _dress(axes: Any) -> None:
    axes.grid(True, axis="y", color=_GREY, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _metric(step: Step, name: str) -> RecordedMetric | None:
    metric = None if step.record is None else step.record.metrics.get(name)
    return metric if metric is not None and math.isfinite(metric.value) else None


def _reach(distance: float) -> float:
    """Half a bar; none where the error is unknown."""
    return distance if math.isfinite(distance) and distance > 0 else 0.0


def _label(index: int, step: Step) -> str:
    lines = [f"{index + 1}. {step.command}"]
    for part in options_text(step.options).split(", "):
        shown = part if len(part) <= _LABEL_CHARACTERS else part[: _LABEL_CHARACTERS - 2] + ".."
        lines.append(shown)
    return "\n".join([*lines, *(["(not here)"] if step.path is None else [])])
