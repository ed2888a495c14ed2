"""Classes of coefficients by their deviation in steps: what they cost, and which pay for a basis.

T tiers, R rows of a basis, G classes of the grid; ratio = standard deviation / step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tolkit_formats.codecs.steps import MAX_FINE_BITS

__all__ = [
    "CLASSES",
    "FINE_CLASS",
    "GRID",
    "MAX_MAGNITUDE",
    "PRICE",
    "bits_at",
    "class_of",
    "fine_bits",
    "fine_for_peaks",
    "gaussian_bits",
    "kept_rows",
    "wider_units",
]

GRID = 33
"""Classes by deviation, up to _LARGEST_RATIO; class 0 is coded as nothing but zeros."""

FINE_CLASS = GRID - 1
"""Second symbols that add b bits are of class FINE_CLASS + b."""

CLASSES = GRID + MAX_FINE_BITS

MAX_MAGNITUDE = 127
"""Of a symbol: one byte holds it and a sign."""

PRICE = 0.12
"""Squared error, in steps, that one bit must remove; 2 ln 2 / 12 in theory at high rates."""

_PER_OCTAVE = 6
_LEAST_RATIO = 0.2
_LARGEST_RATIO = 8.0

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def class_of(ratio_TR: Floats) -> Integers:
    """Class of a coefficient's deviation in steps, 0 where it is not worth coding."""
    with np.errstate(divide="ignore"):
        places = np.floor(np.log2(ratio_TR / _LEAST_RATIO) * _PER_OCTAVE)
    return np.asarray(np.clip(places + 1, 0, GRID - 1), np.int64)


def fine_bits(ratio: Floats) -> Integers:
    """Bits of a second symbol that leave at most _LARGEST_RATIO to the first; mostly 0.

    A coefficient of many steps would need more magnitudes than an alphabet has. Over that width
    it is as good as evenly spread within a multiple of 2^b steps, so nothing is lost in two parts.
    """
    octaves = np.ceil(np.log2(np.maximum(ratio, _LARGEST_RATIO) / _LARGEST_RATIO))
    return np.asarray(np.minimum(octaves, MAX_FINE_BITS), np.int64)


def fine_for_peaks(fine_TR: Integers, peaks_TR: Floats, tier_rows: Integers) -> Integers:
    """The same, with more bits where the largest coefficient is out of reach and worth it.

    Args:
        peaks_TR: largest magnitudes, in steps.
        tier_rows: rows of each tier, all of which pay for a bit more.
    """
    reach_TR = MAX_MAGNITUDE * 2.0**fine_TR
    needed_TR = np.ceil(np.log2(np.maximum(peaks_TR, MAX_MAGNITUDE) / MAX_MAGNITUDE))
    needed_TR = np.clip(needed_TR, fine_TR, MAX_FINE_BITS).astype(np.int64)
    gained_TR = np.maximum(peaks_TR - reach_TR, 0) ** 2
    pays_TR = gained_TR > PRICE * (needed_TR - fine_TR) * tier_rows[:, None]
    return np.where(pays_TR, needed_TR, fine_TR)


def wider_units(peaks_TR: Floats, rows: int) -> Floats:
    """Powers of two that steps of a component grow by where two symbols cannot reach its peak.

    Args:
        rows: of the source, all of which are coded less finely.
    """
    reach = MAX_MAGNITUDE * 2.0**MAX_FINE_BITS
    peaks_R = np.maximum(peaks_TR.max(axis=0, initial=0.0), reach)
    factor_R = 2.0 ** np.ceil(np.log2(peaks_R / reach))
    pays_R = (peaks_R - reach) ** 2 > rows * (factor_R**2 - 1) / 12
    return np.where(pays_R, factor_R, 1.0)


def bits_at(ratio: Floats, costs_G: Floats) -> Floats:
    """Mean bits of a coefficient by its deviation in steps, from those of the classes."""
    fine = fine_bits(ratio)
    with np.errstate(divide="ignore"):
        places = np.log2(ratio / 2.0**fine / _LEAST_RATIO) * _PER_OCTAVE + 0.5
    return np.where(places < 0.5, 0.0, np.interp(places, np.arange(GRID), costs_G[:GRID]) + fine)


def gaussian_bits() -> Floats:
    """The same for each class if its coefficients are Gaussian, before anything was counted."""
    ratios_G = _LEAST_RATIO * 2.0 ** ((np.arange(GRID) - 0.5) / _PER_OCTAVE)
    costs_G = np.zeros(CLASSES)
    costs_G[GRID:] = np.arange(1, MAX_FINE_BITS + 1)
    for place in range(1, GRID):
        edges = torch.arange(4096, dtype=torch.float64) + 0.6
        below = torch.erf(edges / (ratios_G[place] * 2**0.5))
        shares = torch.cat([below[:1], below.diff()]).clamp(min=1e-300)
        entropy = -(shares * shares.log2()).sum() + (1 - shares[0])  # and a sign
        costs_G[place] = float(entropy)
    return costs_G


def kept_rows(ratio_TR: Floats, tier_rows: Integers, width: int) -> tuple[Integers, Integers]:
    """Which rows of the basis pay for their bytes, and their bits: 4, 6 or 8.

    A row's rounding is multiplied by its coefficient, so few bits serve coefficients of few.
    """
    largest_R = ratio_TR.max(axis=0)
    bits_R = np.where(largest_R >= 4, 8, np.where(largest_R >= 1, 6, 4))
    gains_R: Floats = tier_rows @ _gain(ratio_TR)
    keep = np.flatnonzero(gains_R > PRICE * bits_R * width)
    return keep.astype(np.int64), bits_R[keep]


def _gain(ratio: Floats) -> Floats:
    """Squared error, in steps, that coding a coefficient removes, less what its bits cost.

    Of the Gaussian rate-distortion function at its slope for one squared step in twelve.
    """
    level = 1 / 12
    variance = np.maximum(np.where(ratio >= _LEAST_RATIO, ratio, 0.0) ** 2, level)
    return np.asarray(variance - level - level * np.log(variance / level))
