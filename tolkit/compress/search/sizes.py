"""Which size to try next: a root of log(measured / bound) over log(size).

Divergence against size is nearly a straight line in logarithms, so the line through the two
nearest sizes is followed, inside the bracket of the largest size that fails and the smallest that
holds. Near the end a size is tried just within the tolerance of one end, so that its outcome ends
the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["TOLERANCE", "bracket", "next_size"]

TOLERANCE = 0.02
_SLOPE = -3.5  # of log KL over log size, until two sizes are measured: on models tried 3 to 4
_LEAST_STEP, _MOST_STEP = math.log(1.1), math.log(4.0)
_MARGIN = 0.15  # of the bracket that any new size takes off at least


def bracket(excess: Mapping[int, float]) -> tuple[int | None, int | None]:
    """The largest size that fails below the smallest that holds, and that one.

    Args:
        excess: size in bytes -> log(upper end of the interval / bound); 0 and less holds.
    """
    holding = min((size for size, over in excess.items() if over <= 0), default=None)
    failing = max(
        (s for s, over in excess.items() if over > 0 and (holding is None or s < holding)),
        default=None,
    )
    return failing, holding


def next_size(
    excess: Mapping[int, float],
    *,
    floor: int,
    top: int,
    start: int,
    tolerance: float = TOLERANCE,
) -> int | None:
    """The size to measure next, in bytes from `floor` to `top`; None when the search is over.

    It is over when the smallest size that holds is within `tolerance` of one that fails or is the
    floor, or when the top fails.
    """
    failing, holding = bracket(excess)
    if failing is None and holding is None:
        return min(max(start, floor), top)
    if failing is None:
        assert holding is not None
        return None if holding <= floor else max(floor, min(_outside(excess, holding), holding - 1))
    if holding is None:
        return None if failing >= top else min(top, max(_outside(excess, failing), failing + 1))
    if holding <= failing * (1 + tolerance) or holding - failing < 2:
        return None
    size = round(math.exp(_inside(excess, failing, holding, math.log1p(tolerance))))
    return min(max(size, failing + 1), holding - 1)


def _outside(excess: Mapping[int, float], end: int) -> int:
    """Beyond a size all others lie on the far side of, where the line says the bound is met."""
    over = excess[end]
    steps = (_LEAST_STEP, _MOST_STEP)
    slope = _slope(excess, end)
    step = min(max(abs(over / slope), steps[0]), steps[1])
    return round(end * math.exp(step if over > 0 else -step))


def _slope(excess: Mapping[int, float], end: int) -> float:
    """Of the line through `end` and the measured size nearest to it."""
    others = [size for size in excess if size != end and math.isfinite(excess[size])]
    if not others or not math.isfinite(excess[end]):
        return _SLOPE
    near = min(others, key=lambda size: abs(math.log(size / end)))
    slope = (excess[near] - excess[end]) / math.log(near / end)
    return min(max(slope, 2 * _SLOPE), _SLOPE / 4)


def _inside(excess: Mapping[int, float], failing: int, holding: int, tolerance: float) -> float:
    """log of a size in the bracket; `tolerance` in log size too."""
    low, high = math.log(failing), math.log(holding)
    above, below = excess[failing], excess[holding]
    root = low + (high - low) * above / (above - below) if math.isfinite(above) else high
    if high - root < tolerance:
        return max(high - 0.98 * tolerance, low + 0.25 * tolerance)
    if root - low < tolerance:
        return min(low + 0.98 * tolerance, high - 0.25 * tolerance)
    margin = _MARGIN * (high - low)
    return min(max(root + tolerance / 3, low + margin), high - margin)
