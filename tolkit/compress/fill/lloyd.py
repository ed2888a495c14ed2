"""Scalar codebooks fitted to samples (Lloyd-Max), and what a width costs a Gaussian coefficient."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["DISTORTION", "gaussian_codebook", "lloyd_max"]

DISTORTION = np.array(
    [1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000646, 0.000165, 0.0000412]
)
"""Mean squared error of 0 to 8 bits on a Gaussian of variance 1, each width with its best codebook
(Max 1960; 6 to 8 bits from `gaussian_codebook` by integration)."""

_ROUNDS = 40
_ENOUGH = 8  # samples a value of the codebook


def lloyd_max(samples_S: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    """Ascending values [2^bits] that are each the mean of the samples nearest to them.

    Starts from quantiles; a value that no sample is nearest to stays where it was. With few
    samples a Gaussian's codebook is returned: nothing could be learnt from them.
    """
    count = 1 << bits
    if len(samples_S) < _ENOUGH * count:
        return gaussian_codebook(bits)
    ordered = np.sort(samples_S)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    places = ((np.arange(count) + 0.5) / count * len(ordered)).astype(np.int64)
    values = ordered[places] * _widening(bits)
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(ordered, (values[1:] + values[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [len(ordered)]])
        sizes = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(sizes, 1)
        moved = np.sort(np.where(sizes > 0, means, values))
        if np.abs(moved - values).max() < 1e-7:
            break
        values = moved
    return values


@cache
def gaussian_codebook(bits: int) -> npt.NDArray[np.float64]:
    """The codebook of a normal distribution of variance 1; not to be written to."""
    count = 1 << bits
    grid = np.linspace(-6.0, 6.0, 1 << 16)
    density = np.exp(-(grid**2) / 2)
    mass = np.concatenate([[0.0], np.cumsum(density)])
    moment = np.concatenate([[0.0], np.cumsum(density * grid)])
    values = np.interp((np.arange(count) + 0.5) / count, mass[1:] / mass[-1], grid)
    values *= _widening(bits)
    for _ in range(20 * _ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(grid, (values[1:] + values[:-1]) / 2)])
        edges = np.append(edges, len(grid))
        held = np.diff(mass[edges])
        values = np.where(held > 0, np.diff(moment[edges]) / np.maximum(held, 1e-300), values)
    values.flags.writeable = False
    return values


def _widening(bits: int) -> float:
    """Optimal values lie further out than quantiles: their density goes with the cube root."""
    return 1.0 + 0.7 * (1 - 2.0 ** (1 - bits))
