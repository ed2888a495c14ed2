"""Quantiles of a divergence over tokens that stream by, in constant memory.

Values are counted in bins of the float32 number line: a bin spans 1/2048 of a power of two. The
mean of a bin stands for its values, so a quantile is off by at most 0.05 % (a value that all of a
bin's tokens share comes out exactly). The interval needs the spread between windows: 256 groups of
neighbouring windows count in coarser bins, of 1/32 of a power of two.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tolkit.evaluate.estimates import Estimate, student_t_975

__all__ = ["QuantileSketch"]

Floats = npt.NDArray[np.float64]

_GROUPS = 256
_FINE, _COARSE = 11, 5  # bits of a float32's fraction that tell bins apart
_LOWEST, _HIGHEST = -40, 12  # powers of two; nats beyond are counted at the ends
_OFFSET = (_LOWEST + 127) << _FINE
_BINS = 1 + ((_HIGHEST - _LOWEST) << _FINE)  # bin 0: zero and what is below the lowest power


class QuantileSketch:
    """Counts of values >= 0, one a token; mutated by `add`.

    Args:
        windows: W, how many windows the tokens come from; each of them gives at least one.
    """

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._groups = min(windows, _GROUPS)
        self.counts = np.zeros(_BINS, np.int64)
        self.sums = np.zeros(_BINS)
        self.coarse = np.zeros((self._groups, 1 + (_BINS >> (_FINE - _COARSE))), np.int32)
        self.bad = np.zeros(1, np.int64)

    def add(self, values_N: Floats, window_N: npt.NDArray[np.int64]) -> None:
        """Count one value a token; `window_N` is the token's window, 0 .. W-1."""
        finite_N = np.isfinite(values_N)
        if not finite_N.all():
            self.bad += np.count_nonzero(~finite_N)
            values_N, window_N = values_N[finite_N], window_N[finite_N]
        bits_N = values_N.astype(np.float32).view(np.int32) >> (23 - _FINE)
        bin_N = np.clip(bits_N - _OFFSET + 1, 0, _BINS - 1).astype(np.int64)
        self.counts += np.bincount(bin_N, minlength=_BINS)
        self.sums += np.bincount(bin_N, weights=values_N, minlength=_BINS)
        group_N = window_N * self._groups // self._windows
        width = self.coarse.shape[1]
        flat_N = group_N * width + ((bin_N + (1 << (_FINE - _COARSE)) - 1) >> (_FINE - _COARSE))
        self.coarse += np.bincount(flat_N, minlength=self.coarse.size).reshape(self.coarse.shape)

    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """What adds up when several processes counted different windows."""
        return self.counts, self.sums, self.coarse, self.bad

    def estimate(self, p: float) -> Estimate:
        """The `p` quantile: the smallest value with at least a share `p` at or below it.

        The interval inverts the interval of the share of tokens below it (Woodruff 1952), whose
        error is taken between groups of windows and is never less than that of independent
        tokens: where few tokens lie beyond the quantile, the windows at hand may show no spread
        at all. It ends at infinity where the share's interval reaches past the largest (or below
        the smallest) token; `se` is its width / (2 t). NaN throughout with a NaN or without
        tokens.
        """
        cumulative = np.cumsum(self.counts)
        tokens = int(cumulative[-1])
        if self.bad[0] or not tokens:
            return Estimate(math.nan, math.nan, math.nan, math.nan)
        at = self._bin_at(cumulative, p)
        value = self._value_of(at)
        if self._groups < 2:
            return Estimate(value, math.nan, -math.inf, math.inf)
        edge = (at + (1 << (_FINE - _COARSE)) - 1) >> (_FINE - _COARSE)
        below_G = self.coarse[:, : edge + 1].sum(axis=1, dtype=np.float64)
        counts_G = self.coarse.sum(axis=1, dtype=np.float64)
        residual_G = below_G - below_G.sum() / tokens * counts_G
        spread = self._groups / (self._groups - 1) * float((residual_G**2).sum()) / tokens**2
        t = student_t_975(self._groups - 1)
        reach = t * math.sqrt(max(spread, p * (1 - p) / tokens))
        low = -math.inf if p <= reach else self._value_of(self._bin_at(cumulative, p - reach))
        high = math.inf
        if p + reach <= 1:
            high = self._value_of(self._bin_at(cumulative, p + reach))
        return Estimate(value, (high - low) / (2 * t), low, high)

    @staticmethod
    def _bin_at(cumulative: npt.NDArray[np.int64], p: float) -> int:
        # The small slack keeps p = k/N at the k-th value in spite of rounding.
        rank = max(1, math.ceil(p * int(cumulative[-1]) - 1e-9))
        return int(np.searchsorted(cumulative, rank))

    def _value_of(self, at: int) -> float:
        return float(self.sums[at] / self.counts[at])
