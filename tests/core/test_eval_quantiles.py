"""Streaming quantiles against the same thing done with all values at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tolkit.evaluate.estimates import Estimate, student_t_975
from tolkit.evaluate.quantiles import QuantileSketch

REACH = 5e-4  # what a bin can be off by, relative


def sketched(values: np.ndarray, window: np.ndarray, p: float, pieces: int = 3) -> Estimate:
    """In some pieces, as batches come."""
    sketch = QuantileSketch(int(window.max(initial=-1)) + 1)
    for part in np.array_split(np.arange(len(values)), pieces):
        sketch.add(values[part], window[part])
    return sketch.estimate(p)


def oracle(values: np.ndarray, window: np.ndarray, p: float) -> Estimate:
    """All values sorted; every window is a cluster of its own."""
    ordered = np.sort(values)

    def at_share(share: float) -> float:
        if share <= 0:
            return -math.inf
        if share > 1:
            return math.inf
        return float(ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)])

    value = at_share(p)
    counts = np.bincount(window).astype(float)
    below = np.bincount(window, weights=values <= value)
    residual = below - below.sum() / len(values) * counts
    windows = len(counts)
    variance = windows / (windows - 1) * (residual**2).sum() / len(values) ** 2
    t = student_t_975(windows - 1)
    reach = t * math.sqrt(max(variance, p * (1 - p) / len(values)))
    low, high = at_share(p - reach), at_share(p + reach)
    return Estimate(value, (high - low) / (2 * t), low, high)


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("tokens", [1, 2, 99, 100, 101, 1000])
def test_quantile_is_numpys_inverted_cdf(p: float, tokens: int) -> None:
    values = np.random.default_rng(tokens).exponential(size=tokens) ** 8 * 1e-3
    window = np.arange(tokens) % max(1, min(tokens, 7))
    expected = np.quantile(values, p, method="inverted_cdf")
    assert sketched(values, window, p).value == pytest.approx(expected, rel=REACH)


@pytest.mark.parametrize("windows", [2, 30, 200])
@pytest.mark.parametrize("p", [0.5, 0.99])
def test_interval_and_error_are_the_oracles(windows: int, p: float) -> None:
    rng = np.random.default_rng(windows)
    window = np.repeat(np.arange(windows), 40)
    values = np.exp(rng.normal(size=windows)[window] + rng.normal(size=len(window)) - 6)
    found, expected = sketched(values, window, p), oracle(values, window, p)
    assert found.value == pytest.approx(expected.value, rel=REACH)
    # The spread is taken at the edge of a coarser bin, up to 3 % above the quantile.
    for end, right in ((found.low, expected.low), (found.high, expected.high)):
        reach = abs(np.mean(values <= right) - p)
        assert abs(np.mean(values <= end) - p) == pytest.approx(reach, rel=0.15, abs=3e-3)


def test_a_share_that_is_a_whole_number_of_tokens_is_not_missed_by_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point; the 7th of 100 values is meant.
    assert sketched(np.arange(1.0, 101.0), np.arange(100) % 5, 0.07).value == 7.0


def test_values_out_of_the_line_of_bins_are_counted_at_its_ends() -> None:
    values = np.array([0.0, 1e-30, 1e-14, 3.0, 1e9])
    window = np.arange(5) % 2
    assert sketched(values, window, 0.2).value == pytest.approx(0, abs=1e-13)
    assert sketched(values, window, 0.8).value == 3.0
    assert sketched(values, window, 1.0 - 1e-9).value == 1e9
    assert sketched(np.zeros(9), np.arange(9) % 3, 0.5).value == 0.0


def test_windows_that_agree_exactly_leave_the_error_of_independent_tokens() -> None:
    """One token in a hundred of every window lies beyond: no spread between windows at all."""
    values = np.concatenate([np.arange(100.0) + window / 100 for window in range(10)])
    estimate = sketched(values, np.repeat(np.arange(10), 100), 0.99)
    reach = student_t_975(9) * math.sqrt(0.01 * 0.99 / 1000)
    expected = np.quantile(values, [0.99 - reach, 0.99], method="inverted_cdf")
    assert [estimate.low, estimate.value] == pytest.approx(expected, rel=REACH)
    assert estimate.low < estimate.value < estimate.high


def test_more_windows_than_groups_keep_the_interval_honest() -> None:
    """1,000 windows with an offset of their own: about 95 of 100 intervals hold the truth."""
    rng = np.random.default_rng(2)
    window = np.repeat(np.arange(1000), 4)
    hits = {0.5: 0, 0.9: 0}
    for _ in range(120):
        logs = rng.normal(size=1000)[window] + rng.normal(size=len(window))
        for p, deviation in ((0.5, 0.0), (0.9, 1.281552 * math.sqrt(2))):
            estimate = sketched(np.exp(logs), window, p)
            hits[p] += estimate.low <= math.exp(deviation) <= estimate.high
    assert all(0.88 <= count / 120 <= 1 for count in hits.values()), hits


def test_the_interval_of_a_far_quantile_may_have_no_upper_end() -> None:
    values = np.random.default_rng(3).exponential(size=60)
    estimate = sketched(values, np.arange(60) % 6, 0.99)
    assert estimate.high == math.inf
    assert estimate.se == math.inf
    assert math.isfinite(estimate.low)
    assert sketched(values, np.arange(60) % 6, 0.01).low == -math.inf


def test_the_largest_of_few_tokens_is_not_a_certain_quantile() -> None:
    """Every window's tokens are at or below the 99 % quantile of 60: no spread, yet no proof."""
    estimate = sketched(np.ones(60), np.arange(60) % 6, 0.99)
    assert (estimate.value, estimate.high) == (1.0, math.inf)
    many = sketched(np.ones(6000), np.arange(6000) % 60, 0.99)
    assert (many.low, many.high) == (1.0, 1.0)


def test_one_window_knows_no_error() -> None:
    estimate = sketched(np.arange(5.0), np.zeros(5, np.int64), 0.5)
    assert estimate.value == 2.0
    assert math.isnan(estimate.se)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_number_spoils_everything(bad: float) -> None:
    estimate = sketched(np.array([1.0, bad, 2.0]), np.arange(3), 0.5)
    assert all(math.isnan(x) for x in (estimate.value, estimate.se, estimate.low, estimate.high))


def test_no_tokens_are_nan() -> None:
    assert math.isnan(QuantileSketch(3).estimate(0.5).value)


def test_sketches_of_different_windows_add_up() -> None:
    rng = np.random.default_rng(5)
    values, window = rng.exponential(size=900), np.arange(900) % 300
    whole, first, second = (QuantileSketch(300) for _ in range(3))
    whole.add(values, window)
    first.add(values[window < 80], window[window < 80])
    second.add(values[window >= 80], window[window >= 80])
    for into, other in zip(first.arrays(), second.arrays(), strict=True):
        into += other
    for p in (0.5, 0.99):
        assert first.estimate(p).low == pytest.approx(whole.estimate(p).low)
        assert first.estimate(p).value == pytest.approx(whole.estimate(p).value)
