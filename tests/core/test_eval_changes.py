"""Changes from a baseline or a reference: naive formulas, and what their intervals cover."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _eval_results import METRICS, made, recorded, windowed

from tolkit.errors import DataError, MismatchError
from tolkit.evaluate import EvalResult, Metric, TaskItems
from tolkit.evaluate.gates.changes import Change, from_baseline, from_reference

LN2 = math.log(2)


def change(now: EvalResult, before: EvalResult, name: str, relative: bool) -> Change:
    found = from_baseline(now, recorded(before), name, relative)
    assert found is not None
    return found


def jackknife(value: Any, windows: int) -> float:
    """Standard error of `value(kept windows)` by leaving out one window at a time."""
    whole = np.arange(windows)
    parts = np.array([value(np.delete(whole, i)) for i in range(windows)])
    return math.sqrt((windows - 1) / windows * float(((parts - parts.mean()) ** 2).sum()))


def naive(now: EvalResult, before: EvalResult, name: str, relative: bool, kept: Any) -> float:
    """The change on some of the windows, from the definition of the metric."""

    def metric(result: EvalResult) -> float:
        sums = result.windows
        nll, tokens = sums.nll_W[kept].sum(), sums.tokens_W[kept].sum()
        return {
            "ppl_token": math.exp(nll / tokens),
            "ppl_word": math.exp(nll / sums.words_W[kept].sum()),
            "ppl_byte": math.exp(nll / sums.bytes_W[kept].sum()),
            "bits_per_byte": nll / sums.bytes_W[kept].sum() / LN2,
            "ppl_increase": math.exp((nll - sums.reference_nll_W[kept].sum()) / tokens) - 1,
            "kl_mean_nats": sums.kl_W[kept].sum() / tokens,
            "top1_agreement": sums.agreeing_W[kept].sum() / tokens,
        }[name]

    ours, theirs = metric(now), metric(before)
    return ours / theirs - 1 if relative else ours - theirs


CASES = [
    *((name, relative) for name in ("ppl_token", "ppl_word", "ppl_byte") for relative in (0, 1)),
    *(("bits_per_byte", relative) for relative in (0, 1)),
    *(("kl_mean_nats", relative) for relative in (0, 1)),
    ("ppl_increase", 0),
    ("top1_agreement", 0),
]


@pytest.mark.parametrize(("name", "relative"), CASES)
def test_a_paired_change_equals_the_naive_one(name: str, relative: int) -> None:
    now, before = windowed(200, seed=1), windowed(200, seed=2, worse=0.02)
    found = change(now, before, name, bool(relative))
    everything = np.arange(200)
    assert found.paired
    assert found.value == pytest.approx(naive(now, before, name, bool(relative), everything), 1e-5)
    assert found.against == pytest.approx(before.metrics[name].value)
    se = jackknife(lambda kept: naive(now, before, name, bool(relative), kept), 200)
    assert (found.high - found.low) / 2 / 1.972 == pytest.approx(se, rel=0.03)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("name", "relative"), CASES)
def test_the_same_run_again_has_no_change_at_all(name: str, relative: int) -> None:
    now = windowed(50, seed=3)
    found = change(now, now, name, bool(relative))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_paired_is_far_narrower_than_unpaired_and_the_unpaired_one_covers_it() -> None:
    now, before = windowed(100, seed=1), windowed(100, seed=2, worse=0.001)
    for name, relative in (("ppl_token", True), ("ppl_token", False), ("kl_mean_nats", False)):
        paired = change(now, before, name, relative)
        unpaired = change(replace(now, windows=None), before, name, relative)
        assert not unpaired.paired
        assert unpaired.low <= paired.low and paired.high <= unpaired.high
    paired, unpaired = (
        change(result, before, "ppl_token", True) for result in (now, replace(now, windows=None))
    )
    assert (unpaired.high - unpaired.low) > 5 * (paired.high - paired.low)


def test_the_paired_interval_covers_the_truth() -> None:
    """400 draws of 60 windows: 95 % intervals hold the change of the whole population."""
    inside = 0
    for seed in range(400):
        now, before = windowed(60, seed=seed), windowed(60, seed=seed + 10_000, worse=0.01)
        found = change(now, before, "ppl_token", True)
        inside += found.low <= math.exp(-0.01) - 1 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_quantiles_are_compared_with_both_errors() -> None:
    found = change(windowed(20, seed=1), windowed(20, seed=2), "kl_p99_nats", False)
    p99 = METRICS["kl_p99_nats"]
    assert not found.paired
    assert (found.low, found.high) == pytest.approx((p99.low - p99.high, p99.high - p99.low))
    relative = change(windowed(20, seed=1), windowed(20, seed=2), "kl_p99_nats", True)
    assert relative.high == pytest.approx(p99.high / p99.low - 1)


def test_too_many_windows_are_compared_unpaired_and_the_record_says_so() -> None:
    many = windowed(20_001, seed=1)
    record = recorded(many)
    assert record.window_sums == {}
    found = change(many, many, "ppl_token", True)
    assert not found.paired and found.low < 0 < found.high
    assert recorded(windowed(20_000, seed=1)).window_sums


def test_one_window_says_nothing_of_the_error() -> None:
    found = change(windowed(1, seed=1), windowed(1, seed=2), "ppl_token", True)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_against_the_reference_on_the_same_windows() -> None:
    result = windowed(80, seed=4)
    paired = from_reference(result, "ppl_token", True)
    assert paired is not None and paired.paired
    increase = result.metrics["ppl_increase"]
    assert paired.value == pytest.approx(increase.value, rel=1e-9)
    assert from_reference(replace(result, reference_metrics={}), "ppl_token", True) is None


@pytest.mark.parametrize(
    ("name", "now", "before", "relative", "expected"),
    [
        ("bytes", 105, 100, True, 0.05),
        ("bytes", 90, 100, False, -10),
        ("bits_per_value", 0.75, 0.5, True, 0.5),
    ],
)
def test_sizes_have_no_error(
    name: str, now: float, before: float, relative: bool, expected: float
) -> None:
    field = "table_bytes" if name == "bytes" else name
    found = change(made(**{field: now}), made(**{field: before}), name, relative)
    assert found.value == found.low == found.high == pytest.approx(expected)
    assert float(found.exact) == found.value


def test_nothing_compares_with_a_missing_value() -> None:
    lacking = made(metrics={}, table_bytes=None, bits_per_value=None)
    for name in (*METRICS, "bytes", "bits_per_value"):
        assert from_baseline(made(), recorded(lacking), name, False) is None
        assert from_baseline(lacking, recorded(made()), name, False) is None


def test_a_divergence_compared_with_none_at_all() -> None:
    zero = windowed(10, seed=1, divergence=0.0)
    some = windowed(10, seed=1)
    assert change(some, zero, "kl_mean_nats", True).low == math.inf
    assert change(zero, zero, "kl_mean_nats", True).high == 0.0


def with_task(outcomes: str, digest: str = "1" * 64, metric: str = "acc") -> EvalResult:
    share = outcomes.count("1") / len(outcomes)
    name = f"piqa.{metric}"
    value = Metric(share, math.sqrt(share * (1 - share) / len(outcomes)), len(outcomes))
    tasks = {"piqa": TaskItems(digest, {metric: outcomes})}
    return made(metrics={**METRICS, name: value}, tasks=tasks)


def test_items_of_a_task_are_paired() -> None:
    generator = np.random.default_rng(0)
    before = generator.integers(0, 2, 400)
    now = np.where(generator.random(400) < 0.05, 0, before)
    texts = ["".join(map(str, values.tolist())) for values in (now, before)]
    found = change(with_task(texts[0]), with_task(texts[1]), "piqa.acc", False)
    difference = now - before
    se = difference.std(ddof=1) / math.sqrt(400)
    assert found.paired
    assert found.value == pytest.approx(difference.mean())
    # A little wider than a mean's: half an item more in each of the four outcomes.
    assert 1.96 * se < (found.high - found.low) / 2 < 1.15 * 1.96 * se


def test_the_same_bundle_again_differs_by_nothing() -> None:
    again = change(with_task("0110"), with_task("0110"), "piqa.acc", False)
    assert (again.low, again.value, again.high) == (0, 0, 0)
    other = replace(with_task("0110"), identity="e" * 64)
    different = change(other, with_task("0110"), "piqa.acc", False)
    assert different.value == 0
    assert different.low < 0 < different.high


def test_other_items_of_a_task_do_not_compare() -> None:
    with pytest.raises(MismatchError, match=r"other items of task piqa, digest 2{16}, here 1{16}"):
        change(with_task("0110"), with_task("0110", "2" * 64), "piqa.acc", False)
    nameless = made(metrics=with_task("01").metrics)
    assert from_baseline(nameless, recorded(with_task("01")), "piqa.acc", False) is None
    assert from_baseline(with_task("01"), recorded(nameless), "piqa.acc", False) is None


def test_outcomes_that_are_not_the_metric_are_not_paired() -> None:
    odd = with_task("0110")
    odd = replace(odd, metrics={**odd.metrics, "piqa.acc": Metric(0.9, 0.1, 4)})
    assert not change(odd, with_task("0110"), "piqa.acc", False).paired
    assert not change(with_task("01101"), with_task("0110"), "piqa.acc", False).paired


def test_a_changed_record_is_noticed() -> None:
    now, before = windowed(30, seed=1), windowed(30, seed=2)
    for metric in ("ppl_token", "kl_mean_nats", "top1_agreement"):
        other = Metric(before.metrics[metric].value * 0.99, 0.1, 10)
        forged = replace(before, metrics={**before.metrics, metric: other})
        with pytest.raises(DataError, match=f"window_sums give {metric}"):
            change(now, forged, "ppl_token", True)


def test_other_counts_of_the_same_text_do_not_compare() -> None:
    with pytest.raises(MismatchError, match="30 windows of the same text, here 31"):
        change(windowed(31, seed=1), windowed(30, seed=1), "ppl_token", True)


def test_sums_survive_the_file(tmp_path: Path) -> None:
    result = windowed(30, seed=5)
    record = recorded(result)
    line = json.dumps(list(record.window_sums["nll_nats"]))
    assert len(line) < 30 * 14
    np.testing.assert_allclose(record.window_sums["nll_nats"], result.windows.nll_W, rtol=5e-9)
