"""Errors over windows: against loops, tables, and repeated sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tolkit.evaluate.estimates import (
    paired_share_estimate,
    ratio_estimate,
    share_estimate,
    student_t_975,
)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # Printed tables of Student's t.
    [
        *[(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281)],
        *[(30, 2.0423), (60, 2.0003), (120, 1.9799), (200, 1.9719), (1000, 1.9623)],
    ],
)
def test_student_t_equals_the_printed_tables(degrees: int, expected: float) -> None:
    assert student_t_975(degrees) == pytest.approx(expected, abs=6e-5)


def test_the_two_formulas_of_student_t_meet() -> None:
    assert student_t_975(200) > student_t_975(201) > student_t_975(202)
    assert student_t_975(200) - student_t_975(201) < 1e-4


def test_ratio_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(1, 9, 13)
    above = 2 * below + rng.normal(size=13)
    estimate = ratio_estimate(above, below)
    value = sum(above) / sum(below)
    squares = 0.0
    for y, x in zip(above, below, strict=True):
        squares += (y - value * x) ** 2
    se = math.sqrt(13 / 12 * squares) / sum(below)
    assert estimate.value == pytest.approx(value, rel=1e-12)
    assert estimate.se == pytest.approx(se, rel=1e-12)
    assert estimate.high - estimate.value == pytest.approx(2.1788 * se, rel=1e-4)


def test_ratio_of_equal_windows_is_the_plain_standard_error_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    sums = rng.normal(size=40)
    estimate = ratio_estimate(sums, np.full(40, 8.0))
    assert estimate.se == pytest.approx(np.std(sums / 8, ddof=1) / math.sqrt(40), rel=1e-12)


def test_one_window_knows_no_error() -> None:
    estimate = ratio_estimate(np.array([3.0]), np.array([2.0]))
    assert estimate.value == 1.5
    assert math.isnan(estimate.se)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_spoils_everything(bad: float) -> None:
    ratio = ratio_estimate(np.array([1.0, bad, 2.0]), np.ones(3))
    for estimate in (ratio, ratio.exponential()):
        for number in (estimate.value, estimate.se, estimate.low, estimate.high):
            assert math.isnan(number)


def test_nothing_at_all_is_nan() -> None:
    assert math.isnan(ratio_estimate(np.array([]), np.array([])).value)


def test_the_exponential_carries_interval_and_error() -> None:
    estimate = ratio_estimate(np.array([1.0, 1.2, 0.9, 1.1]), np.ones(4))
    grown = estimate.exponential(minus=1.0)
    assert grown.value == pytest.approx(math.exp(estimate.value) - 1)
    assert grown.se == pytest.approx(math.exp(estimate.value) * estimate.se)
    assert grown.low == pytest.approx(math.exp(estimate.low) - 1)
    assert grown.low < grown.value < grown.high
    overflow = ratio_estimate(np.array([1e4, 1e4]), np.ones(2)).exponential()
    assert overflow.value == math.inf  # a gate takes it for "not measured", not for a number


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    """Windows with a shared offset: an error over tokens would be several times too small."""
    rng = np.random.default_rng(2)
    windows, tokens, runs = 40, 25, 300
    index = np.repeat(np.arange(windows), tokens)
    offsets = rng.normal(size=(runs, windows, 1))
    values = (offsets + rng.normal(size=(runs, windows, tokens))).reshape(runs, -1)
    hits = {"mean": 0}
    naive_hits = 0
    for of_run in values:
        sums = np.bincount(index, weights=of_run)
        mean = ratio_estimate(sums, np.full(windows, float(tokens)))
        hits["mean"] += mean.low <= 0 <= mean.high
        naive_hits += abs(of_run.mean()) <= 1.96 * of_run.std() / math.sqrt(len(of_run))
    for name, count in hits.items():
        assert 0.90 <= count / runs <= 0.99, (name, count / runs)
    assert naive_hits / runs < 0.7


@pytest.mark.parametrize(
    ("hits", "items", "low", "high"),
    # Wilson's intervals, worked out by hand from his formula with z = 1.96.
    [(60, 60, 0.93982, 1.0), (0, 60, 0.0, 0.06018), (32, 60, 0.40894, 0.65374)],
)
def test_a_share_leaves_room_for_what_few_items_cannot_show(
    hits: int, items: int, low: float, high: float
) -> None:
    outcomes = np.array([1.0] * hits + [0.0] * (items - hits))
    estimate = share_estimate(outcomes)
    assert estimate.value == hits / items
    assert estimate.se == pytest.approx(np.std(outcomes, ddof=1) / math.sqrt(items))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=2e-5)


def test_equal_items_do_not_prove_that_nothing_changed() -> None:
    outcomes = (np.arange(60) % 3 == 0).astype(float)
    estimate = paired_share_estimate(outcomes, outcomes)
    assert (estimate.value, estimate.se) == (0.0, 0.0)
    # (0.5 - 0.5) / 62 -+ 1.96 sqrt(1 / 62) / sqrt(62)
    assert (estimate.low, estimate.high) == pytest.approx((-0.031612, 0.031612), abs=1e-5)


def test_intervals_of_shares_hold_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    alone = paired = 0
    for _ in range(1000):
        theirs = (rng.random(80) < 0.9).astype(float)
        ours = np.where(rng.random(80) < 0.1, 0.0, theirs)  # some are lost
        share, change = share_estimate(theirs), paired_share_estimate(ours, theirs)
        alone += share.low <= 0.9 <= share.high
        paired += change.low <= -0.9 * 0.1 <= change.high
    assert 0.92 <= alone / 1000 <= 0.99
    assert 0.92 <= paired / 1000 <= 0.99
    assert math.isnan(share_estimate(np.array([1.0, math.nan])).value)
    assert paired_share_estimate(np.ones(1), np.ones(1)).high == math.inf
