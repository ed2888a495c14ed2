"""The Gaussian rate-distortion bound of a table: reverse water-filling over weighted spectra.

V vocabulary, L layers with a table, D hidden, M = L D directions.

The model: row v of layer l is Gaussian with the layer's covariance (mean removed, rows weighted),
rows and layers independent of each other. An error in row v counts w_v (1 on average). Splitting
`r` bits a value over M directions and V rows in the best way leaves the relative error

    D(theta) = sum_mv min(theta, s_mv) / sum_mv s_mv,     s_mv = variance_m w_v
    r(theta) = mean_mv max(0, log2(s_mv / theta) / 2)

for one water level theta. Equal weights give the textbook form. An error of 1 is the variance of
the table: every row replaced by its layer's mean. Real rows are not Gaussian and may need less;
rows of several layers are correlated, and a coder that knows an FFN needs less still.

The same curve stands below errors of running sums over layers: summing maps the layers of a row
one to one and keeps volumes, so as long as every direction is coded, sums take as many bits as
layers do; at larger errors the curve is a guide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GaussianBound"]

Doubles = np.ndarray[Any, np.dtype[np.float64]]

_STEPS_AN_OCTAVE = 16


class GaussianBound:
    """Bits a value against relative squared error, both ways, exact for the model.

    Args:
        variances_M: float64, variance along each principal direction of each layer, any order.
        weights_V: row weights, 1 on average; None weighs all rows alike. Weights within a 16th
            of an octave of each other are replaced by their mean.
        coded: the share of the table's values that belong to these layers; bits count per value
            of all layers.
    """

    def __init__(
        self,
        variances_M: npt.ArrayLike,
        weights_V: npt.NDArray[np.float64] | None = None,
        coded: float = 1.0,
    ) -> None:
        variances = np.asarray(variances_M, np.float64)
        weights, shares = _grouped(weights_V)
        products = np.multiply.outer(variances, weights).ravel()
        counts = np.broadcast_to(shares, (len(variances), len(shares))).ravel() / len(variances)
        order = np.argsort(products, kind="stable")
        order = order[products[order] > 0]
        self._coded = coded
        self._level_S: Doubles = products[order]
        share_S = counts[order]
        # Sums over the components below each one, and over it and those above.
        self._below_S = np.concatenate([[0.0], np.cumsum(share_S * self._level_S)])
        self._above_S = _sums_from(share_S)
        self._logs_S = _sums_from(share_S * np.log2(self._level_S))
        self.variance = float(self._below_S[-1])

    def bits_for(self, error: float) -> float:
        """Bits a value below which no coder of this source has a relative error of `error`.

        inf for an error of 0 (of a source that varies), 0 for errors of 1 and more.
        """
        left = error * self.variance
        if left >= self.variance:
            return 0.0
        if left <= 0:
            return math.inf
        # At level_S[k] the error is below_S[k] + level_S[k] above_S[k]: rising with k.
        ends_S = self._below_S[:-1] + self._level_S * self._above_S[:-1]
        k = int(np.searchsorted(ends_S, left))
        theta = (left - self._below_S[k]) / self._above_S[k]
        rate = (self._logs_S[k] - self._above_S[k] * math.log2(theta)) / 2
        return self._coded * max(0.0, float(rate))

    def error_at(self, bits: float) -> float:
        """The relative error that `bits` a value allow."""
        if not len(self._level_S):
            return 0.0
        rate = bits / self._coded
        rates_S = (self._logs_S[:-1] - self._above_S[:-1] * np.log2(self._level_S)) / 2
        # The rates fall with k; the level is above all components that get nothing.
        k = len(rates_S) - int(np.searchsorted(rates_S[::-1], rate, side="right"))
        if k == len(rates_S):
            return 1.0
        theta = 2 ** ((self._logs_S[k] - 2 * rate) / self._above_S[k])
        return float((self._below_S[k] + theta * self._above_S[k]) / self.variance)


def _sums_from(values_S: Doubles) -> Doubles:
    """sum(values_S[k:]) for every k, 0 at the end."""
    return np.concatenate([np.cumsum(values_S[::-1])[::-1], [0.0]])


def _grouped(weights_V: npt.NDArray[np.float64] | None) -> tuple[Doubles, Doubles]:
    """Few weights instead of V, and the share of rows that each stands for."""
    if weights_V is None:
        return np.ones(1), np.ones(1)
    place_V = np.round(np.log2(weights_V) * _STEPS_AN_OCTAVE).astype(np.int64)
    _, group_V, count_G = np.unique(place_V, return_inverse=True, return_counts=True)
    sums_G = np.bincount(group_V, weights=weights_V)
    return sums_G / count_G, count_G / len(weights_V)
