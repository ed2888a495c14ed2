"""Widths of coefficients: against every allocation there is, on cases small enough to try all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tolkit.compress.fill.allocate import LayerNeed, fill, widths_at
from tolkit.compress.fill.lloyd import DISTORTION

GAINS = DISTORTION[:-1] - DISTORTION[1:]


def draw_needs(seed: int, layers: int, tiers: int, rank: int) -> list[LayerNeed]:
    rng = np.random.default_rng(seed)
    shape = (tiers, rank)
    return [LayerNeed(np.exp(rng.normal(0, 2, shape))) for _ in range(layers)]


def removed(worth_R: np.ndarray, widths_R: np.ndarray) -> float:
    """Squared error that widths take away."""
    return float((worth_R * (1 - DISTORTION[widths_R])).sum())


def best_of_bits(worth_R: np.ndarray, bits: int) -> float:
    """The most that so many bits can remove: the largest gains, which fall with each bit."""
    gains = sorted((w * g for w in worth_R for g in GAINS), reverse=True)
    return float(sum(gains[:bits]))


def brute_force(needs: list[LayerNeed], rows: list[int], budget: int) -> float:
    """The best sum over rows, over all numbers of 4-byte packets for each layer and tier."""
    tiers = range(len(rows))
    choices = []
    for tier in tiers:
        options = []
        most = [-(-need.worth_TR.shape[1] * 8 // 32) for need in needs]
        for packets in itertools.product(*[range(m + 1) for m in most]):
            stride = -(-(4 * sum(packets) + 4) // 16) * 16
            worth = sum(
                best_of_bits(need.worth_TR[tier], 32 * n)
                for need, n in zip(needs, packets, strict=True)
            )
            options.append((stride * rows[tier], worth * rows[tier]))
        choices.append(options)
    best = 0.0
    for picked in itertools.product(*choices):
        if sum(cost for cost, _ in picked) <= budget:
            best = max(best, sum(worth for _, worth in picked))
    return best


def total_removed(needs: list[LayerNeed], widths: tuple[np.ndarray, ...], rows: list[int]) -> float:
    return sum(
        rows[tier] * removed(need.worth_TR[tier], w[tier])
        for need, w in zip(needs, widths, strict=True)
        for tier in range(len(w))
    )


@pytest.mark.parametrize("seed", range(4))
def test_one_tier_gets_the_best_there_is(seed: int) -> None:
    needs = draw_needs(seed, layers=3, tiers=1, rank=9)
    for budget in range(0, 10 * 160, 70):
        filled = fill(needs, [10], budget)
        got = total_removed(needs, filled.widths, [10])
        if budget < 160:
            assert got == 0 and filled.strides == (16,)
            continue
        assert filled.record_bytes([10]) <= budget
        assert got == pytest.approx(brute_force(needs, [10], budget), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_tiers_come_within_a_step_of_the_best(seed: int) -> None:
    """Steps are taken by what they remove a byte; only the one that fits no more is lost."""
    rows = [7, 20, 40]
    (need,) = needs = draw_needs(seed, layers=1, tiers=3, rank=48)
    whole = 67 * 16
    for budget in (whole, whole + 112, whole + 800, whole + 1500, whole + 2400, whole + 4000):
        filled = fill(needs, rows, budget)
        assert filled.record_bytes(rows) <= budget
        want, got = brute_force(needs, rows, budget), total_removed(needs, filled.widths, rows)
        # Past the 12 bytes that every record has anyway.
        steps = [
            n * (best_of_bits(worth_R, 96 + 128) - best_of_bits(worth_R, 96))
            for n, worth_R in zip(rows, need.worth_TR, strict=True)
        ]
        assert want - max(steps) <= got <= want * (1 + 1e-9)


def test_tiers_of_equal_rows_get_the_best_there_is() -> None:
    """All steps cost the same, so taking them by worth is exact."""
    rows = [10, 10, 10]
    needs = draw_needs(11, layers=1, tiers=3, rank=48)
    for budget in range(30 * 16, 30 * 64, 160):
        got = total_removed(needs, fill(needs, rows, budget).widths, rows)
        assert got == pytest.approx(brute_force(needs, rows, budget), rel=1e-9)


def test_codes_fit_the_strides_they_are_given() -> None:
    needs = draw_needs(3, layers=3, tiers=2, rank=40)
    filled = fill(needs, [50, 60], 110 * 64)
    for tier, stride in enumerate(filled.strides):
        segments = [-(-int(w[tier].sum()) // 32) * 4 for w in filled.widths]
        assert sum(segments) + 4 <= stride < sum(segments) + 4 + 16
        assert stride % 16 == 0


def test_more_bytes_never_remove_less_in_one_tier() -> None:
    needs = draw_needs(5, layers=4, tiers=1, rank=30)
    before = -1.0
    for budget in range(0, 40_000, 1500):
        got = total_removed(needs, fill(needs, [64], budget).widths, [64])
        assert got >= before
        before = got
    everything = fill(needs, [64], 10**9)
    assert all((w == 8).all() for w in everything.widths)


def test_what_is_worth_nothing_gets_nothing() -> None:
    worth = np.zeros((1, 12))
    worth[0, 3] = 2.0
    filled = fill([LayerNeed(worth), LayerNeed(np.zeros((1, 12)))], [5], 10**6)
    assert filled.widths[0][0].tolist() == [8 if r == 3 else 0 for r in range(12)]
    assert not filled.widths[1].any() and filled.strides == (16,)
    assert fill([LayerNeed(np.zeros((1, 0)))], [5], 10**6).widths[0].shape == (1, 0)


@pytest.mark.parametrize("price", [1e-6, 1e-3, 0.2, 5.0])
def test_widths_at_a_price_are_those_of_a_loop(price: float) -> None:
    worth_TR = draw_needs(1, 1, 2, 17)[0].worth_TR
    widths = widths_at(worth_TR, price)
    for tier, r in np.ndindex(worth_TR.shape):
        bits = 0
        while bits < 8 and worth_TR[tier, r] * GAINS[bits] >= price:
            bits += 1
        assert widths[tier, r] == bits
