"""What coefficients cost by their deviation in steps, and how they are cut, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tolkit.compress.fill.step_classes import (
    CLASSES,
    GRID,
    bits_at,
    class_of,
    fine_bits,
    fine_for_peaks,
    gaussian_bits,
    wider_units,
)
from tolkit.compress.fill.walk_steps import Symbols, _storable, tables_of


def test_classes_are_steps_of_a_sixth_octave_above_the_least() -> None:
    ratios = np.array([0.0, 0.19, 0.2001, 0.2001 * 2 ** (1 / 6), 0.4001, 1e9])
    assert class_of(ratios).tolist() == [0, 0, 1, 2, 7, GRID - 1]


def test_two_symbols_where_one_would_be_too_wide() -> None:
    ratios = np.array([0.0, 8.0, 8.1, 16.0, 16.1, 1000.0, 1e9])
    assert fine_bits(ratios).tolist() == [0, 0, 1, 1, 2, 7, 7]
    costs = gaussian_bits()
    assert bits_at(np.array([64.0]), costs) == pytest.approx(bits_at(np.array([8.0]), costs) + 3)


def test_outliers_get_reach_where_it_pays() -> None:
    """One coefficient of 500 steps: 373^2 are worth 2 bits of many rows, but not of a million."""
    fine_TR, peaks_TR = np.array([[0, 1], [0, 1]]), np.array([[500.0, 100.0], [500.0, 1e9]])
    got = fine_for_peaks(fine_TR, peaks_TR, np.array([1000, 10**6]))
    assert got.tolist() == [[2, 1], [0, 7]]
    # Beyond 127 x 2^7 steps a component's steps grow, if few enough rows lose by it.
    peaks_TR = np.array([[16256.0, 16257.0, 40000.0], [1.0, 1.0, 1.0]])
    assert wider_units(peaks_TR, 8).tolist() == [1.0, 1.0, 4.0]
    assert wider_units(peaks_TR, 10**9).tolist() == [1.0, 1.0, 1.0]


def test_a_gaussians_bits_by_class() -> None:
    """Against drawn numbers, rounded with the same dead zone."""
    rng = np.random.default_rng(0)
    costs = gaussian_bits()
    for place in (6, 15, 30):
        ratio = 0.2 * 2.0 ** ((place - 0.5) / 6)
        units = np.abs(ratio * rng.standard_normal(400_000))
        symbols = np.where(units < 0.6, 0, np.floor(units + 0.4)).astype(int)
        shares = np.bincount(symbols) / len(symbols)
        entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() + 1 - shares[0]
        assert costs[place] == pytest.approx(entropy, abs=0.01)
        assert bits_at(np.array([ratio, 0.1]), costs) == pytest.approx([costs[place], 0.0])


def test_thresholds_pay_for_the_bits_of_a_magnitude() -> None:
    """A class of rare ones rounds them away for longer than one of frequent ones."""
    counts = np.zeros((1, CLASSES, 256))
    counts[0, 5, :3] = 9000, 50, 50
    counts[0, 20, :5] = 4000, 2000, 2000, 1000, 1000
    found = np.zeros((CLASSES, 3))
    found[20, 0] = 4000
    short = 0.125 * found
    tables = tables_of(Symbols(counts, [], short, found))
    assert float(tables.zero_K[5]) > float(tables.zero_K[20]) >= 0.5
    assert tables.offsets_K3[20].tolist() == [0.125, 0.0, 0.0]
    assert float(tables.largest_K[0]) == 0  # class 0 codes nothing
    # By the formula: (v0 + v1) / 2 + price * (b1 - b0) / 2 / (v1 - v0)
    want = 0.4375 + 0.12 * (math.log2(4000.5 / 2000.5)) / 2 / 0.875
    assert float(tables.zero_K[20]) == pytest.approx(max(want, 0.5), abs=1e-4)


def test_stored_scales_are_those_of_the_walk() -> None:
    """Rounding them afterwards cut coefficients of 10,000 steps off by whole steps."""
    rng = np.random.default_rng(0)
    scales_R = rng.uniform(0.5, 2, 1000).astype(np.float16).astype(np.float64)
    unit_R = np.exp(rng.standard_normal(1000) * 2)
    scales_R[0] = 0.0
    got_R = _storable(unit_R, scales_R)
    product_R = got_R * scales_R
    assert np.abs(product_R - product_R.astype(np.float16)).max() <= 1e-15 * product_R.max()
    assert np.abs(got_R / unit_R - 1).max() <= 2**-11
