"""The figure of a frontier: KL divergence, and table error with the bound, over bits a value.

Every point carries its method's name; names move aside for each other, on a thin line to their
point where they end up far from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tolkit.study.figure import COLOURS, log_floor, panel, plain_ticks, with_errors
from tolkit.study.store import Point

__all__ = ["draw", "frontier"]

_FONT = 6.5
_SIZE_IN = (8.0, 9.6)
_ERROR = "error"
"""Key of the error a point is drawn at: the one its method keeps small."""

_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "bitsandbytes": {"color": COLOURS[1], "marker": "s", "label": "bitsandbytes"},
    "gguf": {"color": COLOURS[2], "marker": "^", "label": "GGUF (gguf)"},
    "hqq": {"color": COLOURS[3], "marker": "D", "label": "HQQ"},
    "torchao": {"color": COLOURS[4], "marker": "v", "label": "torchao"},
    "ffn-nf4": {"color": COLOURS[5], "marker": "*", "markersize": 11, "label": "nf4 FFN weights"},
}
_PLAIN: Mapping[str, Any] = {
    "color": COLOURS[0],
    "marker": "o",
    "markerfacecolor": "white",
    "label": "tolkit, plain",
}
_FEEDBACK: Mapping[str, Any] = {"color": COLOURS[0], "marker": "o", "label": "tolkit, feedback"}
_STEPS = ((6, -2), (6, 5), (6, -9), (-6, -2), (-6, 5), (-6, -9), (0, 7), (0, -11))
_FAR = tuple(
    (side * reach, rise)
    for reach in (12, 24, 40)
    for rise in (14, -20, 24, -30, 36, -42)
    for side in (1, -1)
)


def draw(figure: Any, rows: Sequence[Point]) -> None:
    """Two panels, one above the other; an empty one where nothing was measured."""
    figure.set_size_inches(*_SIZE_IN)
    above = panel(figure, "", "KL divergence (nats a token)", (2, 1, 1))
    below = panel(figure, "bits a value, everything counted", "squared error / variance", (2, 1, 2))
    methods = [{**row, _ERROR: _error(row)} for row in rows if row["family"] != "bound"]
    shown = log_floor(methods, "kl_mean_nats")
    _points(above, shown, "kl_mean_nats", "kl_mean_nats_se")
    line = frontier(row for row in shown if row["mode"] == "feedback")
    above.plot(*_xy(line, "kl_mean_nats"), color=COLOURS[0], linewidth=1.2)
    known = [row for row in methods if row[_ERROR]]
    _points(below, known, _ERROR, "")
    curve = next(row["curve"] for row in rows if row.get("curve"))
    below.plot(*zip(*curve, strict=True), color="#333333", linestyle="--", label="Gaussian bound")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
    _limits(below, above, [row["bits_per_value"] for row in methods], known)
    above.legend(loc="upper right", fontsize=8, ncols=2)
    below.legend(*_marks(below), loc="lower left", fontsize=8, title=_KEY, title_fontsize=8)
    figure.draw_without_rendering()
    _write(above, _names(shown, "kl_mean_nats"))
    _write(below, _names(known, _ERROR))


_KEY = "filled circles: error of the running sum;\nall others: of the tables"


def _marks(axes: Any) -> tuple[list[Any], list[str]]:
    """Only the bound: the marks are explained above."""
    handles, labels = axes.get_legend_handles_labels()
    chosen = [(h, text) for h, text in zip(handles, labels, strict=True) if "bound" in text]
    return [h for h, _ in chosen], [text for _, text in chosen]


def frontier(rows: Any) -> list[Point]:
    """Those that no other beats in both size and KL divergence, by size."""
    best: list[Point] = []
    for row in sorted(rows, key=lambda row: (row["bits_per_value"], row["kl_mean_nats"])):
        if not best or row["kl_mean_nats"] < best[-1]["kl_mean_nats"]:
            best.append(row)
    return best


def _error(row: Point) -> float | None:
    found: float | None = row.get("sum_error" if row["mode"] == "feedback" else "table_error")
    return found


def _points(axes: Any, rows: Sequence[Point], y: str, se: str) -> None:
    """Marks of every family, bars where there is an error."""
    own = [row for row in rows if row["family"] == "ours"]
    groups: list[tuple[Mapping[str, Any], list[Point]]] = [
        (_FEEDBACK, [row for row in own if row["mode"] == "feedback"]),
        (_PLAIN, [row for row in own if row["mode"] != "feedback"]),
    ]
    groups += [(look, [row for row in rows if row["family"] == f]) for f, look in _LOOKS.items()]
    for look, chosen in groups:
        if chosen:
            style = {
                "linestyle": "none",
                "markersize": 5,
                **{k: v for k, v in look.items() if k != "label"},
            }
            with_errors(axes, chosen, "bits_per_value", y, se, style, str(look["label"]))


def _xy(rows: Sequence[Point], y: str) -> tuple[list[float], list[float]]:
    return [row["bits_per_value"] for row in rows], [row[y] for row in rows]


def _limits(below: Any, above: Any, bits: Sequence[float], known: Sequence[Point]) -> None:
    """Room around the points; the bound goes on beyond."""
    if not bits:
        return
    for axes in (above, below):
        axes.set_xlim(min(bits) / 1.3, max(bits) * 1.5)
    if known:
        errors = [row[_ERROR] for row in known]
        below.set_ylim(min(errors) / 8, max(1.3, 2 * max(errors)))


@dataclass(frozen=True)
class _Name:
    """What to write at a point of the axes; its colour is the mark's, which says the library."""

    text: str
    x: float
    y: float
    colour: str


def _names(rows: Sequence[Point], y: str) -> list[_Name]:
    return [
        _Name(
            _short(str(row["method"])),
            row["bits_per_value"],
            row[y],
            _LOOKS.get(row["family"], _FEEDBACK)["color"],
        )
        for row in rows
    ]


def _short(name: str) -> str:
    for prefix in ("bnb-", "gguf-", "torchao-"):
        name = name.removeprefix(prefix)
    return name


def _write(axes: Any, names: Sequence[_Name]) -> None:
    """Write each name next to its point, where neither names nor points are yet."""
    scale = 72 / axes.figure.dpi
    spots = [axes.transData.transform((name.x, name.y)) * scale for name in names]
    taken = [(u - 4, v - 4, u + 4, v + 4) for u, v in spots]
    frame = axes.get_window_extent()
    edges = [value * scale for value in (frame.x0, frame.y0, frame.x1, frame.y1)]
    legend = axes.get_legend()
    if legend is not None:
        box = legend.get_window_extent()
        taken.append((box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale))
    order = sorted(range(len(names)), key=lambda i: (spots[i][1], spots[i][0]))
    for i in order:
        name = names[i]
        step, box = _free_box(name.text, spots[i], taken, edges)
        taken.append(box)
        arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkB": 3}
        axes.annotate(
            name.text,
            (name.x, name.y),
            xytext=step,
            textcoords="offset points",
            fontsize=_FONT,
            color=name.colour,
            ha="left" if step[0] > 0 else "right" if step[0] < 0 else "center",
            arrowprops=arrow if step in _FAR else None,
        ).set_in_layout(False)


Box = tuple[float, float, float, float]


def _free_box(
    name: str, spot: Any, taken: Sequence[Box], edges: Sequence[float]
) -> tuple[tuple[float, float], Box]:
    """The first step whose box is free, else the one that covers least."""
    tried = []
    for number, step in enumerate((*_STEPS, *_FAR)):
        box = _box(name, spot, step)
        inside = edges[0] < box[0] and box[2] < edges[2] and edges[1] < box[1] < edges[3] - _FONT
        covered = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6)
        if covered == 0:
            return step, box
        tried.append((covered, number, step, box))
    _, _, step, box = min(tried)
    return step, box


def _box(name: str, spot: Any, step: tuple[float, float]) -> Box:
    width = 0.58 * _FONT * len(name)
    left = spot[0] + step[0] - (width if step[0] < 0 else 0 if step[0] > 0 else width / 2)
    low = spot[1] + step[1] - 1
    return (left, low, left + width, low + _FONT + 1)


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, up)
