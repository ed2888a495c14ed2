"""Errors over windows: against loops, tables, and repeated sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tolkit.evaluate.estimates import quantile_estimate, ratio_estimate, student_t_975


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
    quantile = quantile_estimate(np.arange(5.0), np.zeros(5, np.int64), 0.5)
    assert quantile.value == 2.0
    assert (quantile.low, quantile.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_spoils_everything(bad: float) -> None:
    ratio = ratio_estimate(np.array([1.0, bad, 2.0]), np.ones(3))
    quantile = quantile_estimate(np.array([1.0, bad, 2.0]), np.arange(3), 0.5)
    for estimate in (ratio, ratio.exponential(), quantile):
        for number in (estimate.value, estimate.se, estimate.low, estimate.high):
            assert math.isnan(number)


def test_nothing_at_all_is_nan() -> None:
    assert math.isnan(ratio_estimate(np.array([]), np.array([])).value)
    assert math.isnan(quantile_estimate(np.array([]), np.array([], np.int64), 0.5).value)


def test_the_exponential_carries_interval_and_error() -> None:
    estimate = ratio_estimate(np.array([1.0, 1.2, 0.9, 1.1]), np.ones(4))
    grown = estimate.exponential(minus=1.0)
    assert grown.value == pytest.approx(math.exp(estimate.value) - 1)
    assert grown.se == pytest.approx(math.exp(estimate.value) * estimate.se)
    assert grown.low == pytest.approx(math.exp(estimate.low) - 1)
    assert grown.low < grown.value < grown.high
    overflow = ratio_estimate(np.array([1e4, 1e4]), np.ones(2)).exponential()
    assert overflow.value == math.inf  # a gate takes it for "not measured", not for a number


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("tokens", [1, 2, 99, 100, 101, 1000])
def test_quantile_is_numpys_inverted_cdf(p: float, tokens: int) -> None:
    values = np.random.default_rng(tokens).exponential(size=tokens)
    window = np.arange(tokens) % max(1, min(tokens, 7))
    expected = np.quantile(values, p, method="inverted_cdf")
    assert quantile_estimate(values, window, p).value == expected


def test_a_share_that_is_a_whole_number_of_tokens_is_not_missed_by_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point; the 7th of 100 values is meant.
    assert quantile_estimate(np.arange(1.0, 101.0), np.arange(100) % 5, 0.07).value == 7.0


def test_windows_that_agree_exactly_leave_the_error_of_independent_tokens() -> None:
    """One token in a hundred of every window lies beyond: no spread between windows at all."""
    values = np.concatenate([np.arange(100.0) + window / 100 for window in range(10)])
    estimate = quantile_estimate(values, np.repeat(np.arange(10), 100), 0.99)
    reach = student_t_975(9) * math.sqrt(0.01 * 0.99 / 1000)
    assert estimate.value == np.quantile(values, 0.99, method="inverted_cdf")
    assert estimate.low == np.quantile(values, 0.99 - reach, method="inverted_cdf")
    assert estimate.low < estimate.value < estimate.high


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    """Windows with a shared offset: an error over tokens would be several times too small."""
    rng = np.random.default_rng(2)
    windows, tokens, runs = 40, 25, 300
    index = np.repeat(np.arange(windows), tokens)
    offsets = rng.normal(size=(runs, windows, 1))
    values = (offsets + rng.normal(size=(runs, windows, tokens))).reshape(runs, -1)
    hits = {"mean": 0, "median": 0, "p90": 0}
    naive_hits = 0
    p90 = 1.281552 * math.sqrt(2)  # of the sum of two standard normals
    for of_run in values:
        sums = np.bincount(index, weights=of_run)
        mean = ratio_estimate(sums, np.full(windows, float(tokens)))
        hits["mean"] += mean.low <= 0 <= mean.high
        median = quantile_estimate(of_run, index, 0.5)
        hits["median"] += median.low <= 0 <= median.high
        upper = quantile_estimate(of_run, index, 0.9)
        hits["p90"] += upper.low <= p90 <= upper.high
        naive_hits += abs(of_run.mean()) <= 1.96 * of_run.std() / math.sqrt(len(of_run))
    for name, count in hits.items():
        assert 0.90 <= count / runs <= 0.99, (name, count / runs)
    assert naive_hits / runs < 0.7


def test_the_interval_of_a_far_quantile_may_have_no_upper_end() -> None:
    values = np.random.default_rng(3).exponential(size=60)
    estimate = quantile_estimate(values, np.arange(60) % 6, 0.99)
    assert estimate.high == math.inf
    assert estimate.se == math.inf
    assert math.isfinite(estimate.low)
    assert quantile_estimate(values, np.arange(60) % 6, 0.01).low == -math.inf


def test_the_largest_of_few_tokens_is_not_a_certain_quantile() -> None:
    """Every window's tokens are at or below the 99 % quantile of 60: no spread, yet no proof."""
    estimate = quantile_estimate(np.ones(60), np.arange(60) % 6, 0.99)
    assert (estimate.value, estimate.high) == (1.0, math.inf)
    many = quantile_estimate(np.ones(6000), np.arange(6000) % 60, 0.99)
    assert (many.low, many.high) == (1.0, 1.0)
