"""Means and ratios of tokens that come in windows, with honest errors (quantiles: quantiles.py).

Tokens of one window are not independent, so a window is one observation (a cluster): errors over
tokens would be 1.1 to 2.3 times too small. W windows, N tokens; all arrays float64.

- A mean per token (or word, or byte) is a ratio of sums over windows; its standard error is the
  usual linearised ratio estimator (Cochran, Sampling Techniques, chapter 6).
- Intervals are two-sided 95 % with Student's t for W - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Estimate",
    "paired_share_estimate",
    "ratio_estimate",
    "share_estimate",
    "student_t_975",
]

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and two-sided 95 % interval.

    With one window nothing is known of the error: `se` is NaN, `low` and `high` are infinite.
    """

    value: float
    se: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit, `factor` > 0."""
        return Estimate(
            self.value * factor, self.se * factor, self.low * factor, self.high * factor
        )

    def exponential(self, minus: float = 0.0) -> Estimate:
        """exp(value) - `minus`: delta-method error, interval carried through exp."""
        centre = _exp(self.value)
        return Estimate(
            centre - minus, centre * self.se, _exp(self.low) - minus, _exp(self.high) - minus
        )


def ratio_estimate(numerator_W: Floats, denominator_W: Floats) -> Estimate:
    """sum(numerator) / sum(denominator) over windows; NaN throughout when either holds a NaN."""
    windows = len(numerator_W)
    total = float(denominator_W.sum())
    value = float(numerator_W.sum()) / total if total > 0 else math.nan
    if not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    if windows < 2:
        return Estimate(value, math.nan, -math.inf, math.inf)
    residual_W = numerator_W - value * denominator_W
    variance = windows / (windows - 1) * float((residual_W**2).sum()) / total**2
    se = math.sqrt(variance)
    reach = student_t_975(windows - 1) * se
    return Estimate(value, se, value - reach, value + reach)


def share_estimate(hits_N: Floats) -> Estimate:
    """The share of N items that hit (0 or 1 each), with the sample standard error of a mean.

    The interval is Wilson's (1927): all of few items leave room for a miss, where a mean's own
    interval would have no width. NaN throughout with a NaN or without items.
    """
    items = len(hits_N)
    mean = ratio_estimate(hits_N, np.ones(items))
    if not math.isfinite(mean.value) or items < 2:
        return mean
    middle = (mean.value + _Z**2 / (2 * items)) / (1 + _Z**2 / items)
    spread = mean.value * (1 - mean.value) / items + (_Z / (2 * items)) ** 2
    reach = _Z * math.sqrt(spread) / (1 + _Z**2 / items)
    # At 0 and 1 the interval ends there; rounding must not say otherwise.
    low = 0.0 if mean.value == 0 else middle - reach
    high = 1.0 if mean.value == 1 else middle + reach
    return Estimate(mean.value, mean.se, low, high)


def paired_share_estimate(ours_N: Floats, theirs_N: Floats) -> Estimate:
    """How much larger the share of hits is in `ours_N` than in `theirs_N`, item by item.

    Standard error of the mean difference; the interval is Agresti and Min's (2005), half an item
    added to each of the four outcomes: no difference on few items does not prove that there is
    none. NaN throughout with a NaN or without items.
    """
    items = len(ours_N)
    mean = ratio_estimate(ours_N - theirs_N, np.ones(items))
    if not math.isfinite(mean.value) or items < 2:
        return mean
    gained = float((ours_N > theirs_N).sum()) + 0.5
    lost = float((ours_N < theirs_N).sum()) + 0.5
    total = items + 2
    middle = (gained - lost) / total
    reach = _Z * math.sqrt((gained + lost) / total - middle**2) / math.sqrt(total)
    return Estimate(mean.value, mean.se, middle - reach, middle + reach)


def _exp(value: float) -> float:
    return math.inf if value > 709.0 else math.exp(value)


def student_t_975(degrees: int) -> float:
    """The 97.5 % point of Student's t; 12.706 for one degree of freedom, 1.960 for many.

    Solved on the closed form of the distribution for whole degrees of freedom (Abramowitz and
    Stegun 26.7.3-4), up to 200; the Cornish-Fisher expansion (26.7.5) beyond.
    """
    assert degrees >= 1
    if degrees > 200:
        z = _Z
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = total = 0.0
    if degrees > 1:
        term = total = cosine if odd else 1.0
        for k in range(3 if odd else 2, degrees - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
