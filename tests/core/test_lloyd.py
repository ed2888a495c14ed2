"""Codebooks and tiers: against exhaustive search, integration, and corners by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tolkit.compress.fill.lloyd import DISTORTION, gaussian_codebook, lloyd_max
from tolkit.compress.tiers import tier_ranges


def squared_error(samples: np.ndarray, values: np.ndarray) -> float:
    return float((np.abs(samples[:, None] - values).min(axis=1) ** 2).sum())


def best_squared_error(samples: np.ndarray, count: int) -> float:
    """Of all ways to cut sorted samples into `count` runs, the best: dynamic programming."""
    ordered = np.sort(samples)

    def cost(i: int, j: int) -> float:
        return float(((ordered[i:j] - ordered[i:j].mean()) ** 2).sum()) if j > i else 0.0

    best = [cost(0, j) for j in range(len(ordered) + 1)]
    for _ in range(count - 1):
        best = [min(best[i] + cost(i, j) for i in range(j + 1)) for j in range(len(ordered) + 1)]
    return best[-1]


@pytest.mark.parametrize(("bits", "count"), [(1, 16), (1, 40), (2, 60)])
@pytest.mark.parametrize("seed", range(3))
def test_lloyd_is_near_the_best_there_is(bits: int, count: int, seed: int) -> None:
    samples = np.random.default_rng(seed).standard_normal(count)
    values = lloyd_max(samples, bits)
    assert values.shape == (1 << bits,) and (np.diff(values) >= 0).all()
    best = best_squared_error(samples, 1 << bits)
    assert best * (1 - 1e-9) <= squared_error(samples, values) <= 1.15 * best


def test_each_value_is_the_mean_of_what_is_nearest_to_it() -> None:
    samples = np.random.default_rng(0).laplace(size=3000)
    values = lloyd_max(samples, 3)
    nearest = np.abs(samples[:, None] - values).argmin(axis=1)
    means = [samples[nearest == i].mean() for i in range(8)]
    assert np.allclose(values, means, atol=2e-2)
    assert squared_error(samples, values) < squared_error(samples, gaussian_codebook(3))


def test_equal_samples_and_too_few() -> None:
    constant = lloyd_max(np.full(64, 2.5), 2)
    assert squared_error(np.full(64, 2.5), constant) == 0 and (np.diff(constant) >= 0).all()
    assert np.array_equal(lloyd_max(np.zeros(64), 2), np.zeros(4))
    few = np.random.default_rng(0).standard_normal(31)
    assert np.array_equal(lloyd_max(few, 2), gaussian_codebook(2))
    assert np.array_equal(lloyd_max(few[:0], 8), gaussian_codebook(8))


@pytest.mark.parametrize("bits", range(9))
def test_the_distortion_of_a_gaussian(bits: int) -> None:
    """The stored figures are those of the best codebook, by integration."""
    values = np.zeros(1) if bits == 0 else gaussian_codebook(bits)
    assert (np.diff(values) > 0).all() and np.allclose(values, -values[::-1], atol=1e-3)
    edges = np.concatenate([[-9.0], (values[1:] + values[:-1]) / 2, [9.0]])
    total = 0.0
    for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
        x = np.linspace(low, high, 4001)
        density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
        total += float(np.trapezoid((x - value) ** 2 * density, x))
    assert total == pytest.approx(DISTORTION[bits], rel=0.01)


def check_tiling(ranges: tuple[tuple[int, int], ...], num_rows: int) -> None:
    assert ranges[0][0] == 0 and ranges[-1][1] == num_rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_tiers_of_nothing_to_tell_apart() -> None:
    for counts in (None, np.full(500, 7, np.uint64), np.zeros(500, np.uint64)):
        assert tier_ranges(counts, 500) == ((0, 500),)
    falling = np.arange(500, dtype=np.uint64)[::-1]
    assert tier_ranges(falling, 500, 1) == ((0, 500),)


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32])
def test_few_tokens_make_one_tier(num_rows: int) -> None:
    counts = (1000 >> np.arange(num_rows) // 2).astype(np.uint64)
    assert tier_ranges(counts, num_rows) == ((0, num_rows),)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tiers", [2, 3, 8])
def test_tiers_tile_the_slots_and_are_not_small(seed: int, tiers: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(33, 4000))
    counts = np.sort(rng.zipf(1.3, num_rows).clip(max=10**9).astype(np.uint64))[::-1]
    ranges = tier_ranges(counts, num_rows, tiers)
    check_tiling(ranges, num_rows)
    assert len(ranges) <= tiers
    assert len(ranges) == 1 or all(stop - first >= 32 for first, stop in ranges)


def test_tiers_cut_where_the_logarithm_crosses_equal_steps() -> None:
    counts = np.repeat([2**20 - 1, 2**10 - 1, 0], [40, 50, 60]).astype(np.uint64)
    assert tier_ranges(counts, 150, 4) == ((0, 40), (40, 90), (90, 150))
    assert tier_ranges(counts, 150, 2) == ((0, 90), (90, 150))


def test_a_small_group_joins_its_neighbour() -> None:
    counts = np.repeat([2**20 - 1, 2**10 - 1, 0], [3, 60, 60]).astype(np.uint64)
    check_tiling(tier_ranges(counts, 123, 4), 123)
    assert tier_ranges(counts, 123, 4) == ((0, 63), (63, 123))
    counts = np.repeat([2**20 - 1, 2**10 - 1, 0], [60, 60, 3]).astype(np.uint64)
    assert tier_ranges(counts, 123, 4) == ((0, 60), (60, 123))
    largest = np.array([2**64 - 1] * 40 + [0] * 40, np.uint64)
    assert tier_ranges(largest, 80) == ((0, 40), (40, 80))
