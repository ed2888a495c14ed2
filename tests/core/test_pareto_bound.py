"""The Gaussian bound against the textbook, a naive water level, and a coder near it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tolkit.study.pareto_bound import GaussianBound

Doubles = np.ndarray[Any, np.dtype[np.float64]]


def naive(variances_M: Doubles, weights_V: Doubles, error: float) -> float:
    """Bits a value at a relative error: every (direction, row) apart, the level by bisection."""
    products = [float(v * w) for v in variances_M for w in weights_V]
    low, high = 0.0, max(products)
    for _ in range(200):
        theta = (low + high) / 2
        if sum(min(theta, s) for s in products) < error * sum(products):
            low = theta
        else:
            high = theta
    return sum(max(0.0, math.log2(s / high) / 2) for s in products if s > 0) / len(products)


@pytest.mark.parametrize("error", [0.9, 0.5, 0.1, 1e-3, 1e-9])
def test_one_variance_needs_half_a_bit_for_each_halving(error: float) -> None:
    bound = GaussianBound([3.0, 3.0])
    assert bound.bits_for(error) == pytest.approx(-math.log2(error) / 2, rel=1e-12)
    assert bound.error_at(-math.log2(error) / 2) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("error", [0.97, 0.6, 0.2, 0.03, 1e-4])
@pytest.mark.parametrize("weighted", [False, True])
def test_reverse_water_filling(error: float, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    variances_M = np.concatenate([rng.exponential(size=9) ** 3, [0.0, 0.0]])
    weights_V = rng.choice([0.25, 1.0, 3.0, 7.0], 40) if weighted else np.ones(40)
    weights_V = weights_V / weights_V.mean()
    bound = GaussianBound(variances_M, weights_V if weighted else None)
    expected = naive(variances_M, weights_V, error)
    assert bound.bits_for(error) == pytest.approx(expected, rel=1e-9)
    assert bound.error_at(expected) == pytest.approx(error, rel=1e-9)


def test_many_weights_are_grouped_at_little_cost() -> None:
    rng = np.random.default_rng(2)
    variances_M, weights_V = rng.exponential(size=5), rng.exponential(size=300) + 0.01
    weights_V /= weights_V.mean()
    bound = GaussianBound(variances_M, weights_V)
    for error in (0.5, 0.05):
        expected = naive(variances_M, weights_V, error)
        assert bound.bits_for(error) == pytest.approx(expected, rel=1e-3)
    assert bound.variance == pytest.approx(variances_M.mean())


def test_ends() -> None:
    bound = GaussianBound([1.0, 0.5])
    assert bound.bits_for(1.0) == bound.bits_for(7.0) == 0.0
    assert bound.bits_for(0.0) == math.inf
    assert bound.error_at(0.0) == 1.0
    constant = GaussianBound([0.0, 0.0])
    assert constant.bits_for(0.0) == constant.error_at(0.0) == constant.variance == 0.0


def test_bits_count_per_value_of_all_layers() -> None:
    whole, half = GaussianBound([2.0]), GaussianBound([2.0], coded=0.5)
    assert half.bits_for(0.01) == whole.bits_for(0.01) / 2
    assert half.error_at(1.0) == whole.error_at(2.0)


def test_an_ideal_scalar_coder_is_a_quarter_bit_above() -> None:
    """Uniform steps with ideal entropy coding: 0.2546 bits at high rate, for any variances."""
    rng = np.random.default_rng(3)
    deviations_M = np.array([4.0, 1.0, 0.5])
    values_NM = rng.normal(size=(200_000, 3)) * deviations_M
    step = 0.1
    codes_NM = np.round(values_NM / step)
    error = ((values_NM - codes_NM * step) ** 2).sum() / (values_NM**2).sum()
    bits = 0.0
    for codes_N in codes_NM.T:
        share = np.unique(codes_N, return_counts=True)[1] / len(codes_N)
        bits -= float(share @ np.log2(share)) / 3
    gap = bits - GaussianBound(deviations_M**2).bits_for(error)
    assert gap == pytest.approx(0.2546, abs=0.01)
