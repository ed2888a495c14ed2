"""How far a result is from a baseline or a reference, with the error of that difference.

Both were measured on the same windows (or the same items of a task), so the difference of each
window's sums is one observation; its error is far smaller than that of either value. Where the
sums of one side are not there, both intervals are taken at their worst. W windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tolkit.errors import DataError, MismatchError
from tolkit.evaluate.estimates import (
    Estimate,
    paired_share_estimate,
    ratio_estimate,
    student_t_975,
)
from tolkit.evaluate.gates.syntax import EXACT_METRICS
from tolkit.evaluate.result import EvalResult, Metric, WindowSums, rounded
from tolkit.quality_log import QualityRecord, RecordedMetric

__all__ = ["Change", "from_baseline", "from_reference"]

Floats = npt.NDArray[np.float64]
_PERPLEXITIES = ("ppl_token", "ppl_word", "ppl_byte")
_NOTHING = Estimate(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Change:
    """A difference, or a ratio minus 1 where the gate is relative, and its 95 % interval.

    against: the other's value.
    paired: whether it comes from differences of windows or items; exact sizes count as such.
    exact: the change without any rounding, where there is no measuring error.
    """

    against: float
    value: float
    low: float
    high: float
    paired: bool
    exact: Fraction | None = None


def from_reference(result: EvalResult, name: str, relative: bool) -> Change | None:
    """Change of a perplexity from the reference's on the same windows; None if not measured."""
    ours, theirs = result.metrics.get(name), result.reference_metrics.get(name)
    if ours is None or theirs is None:
        return None
    sums = result.windows
    if sums is not None and sums.reference_nll_W is not None:
        pair = {"nll": (sums.nll_W, sums.reference_nll_W)}
        return _paired(name, relative, sums, pair, theirs.value)
    return _unpaired(ours, _recorded(theirs), relative)


def from_baseline(
    result: EvalResult, record: QualityRecord, name: str, relative: bool
) -> Change | None:
    """Change of any metric from a record of the same setting; None if either was not measured.

    Raises:
        MismatchError: not as many windows or tokens, or another task's items.
        DataError: a record whose window sums are not those of its metrics.
    """
    require_same_counts(result, record)
    if name in EXACT_METRICS:
        return _exact(result, record, name, relative)
    ours, theirs = result.metrics.get(name), record.metrics.get(name)
    if ours is None or theirs is None or not math.isfinite(theirs.value):
        return None
    if "." in name:
        return _of_task(result, record, name, relative)
    pair = _sums(result.windows, record)
    if result.windows is not None and pair is not None:
        found = _paired(name, relative, result.windows, pair, theirs.value)
        if found is not None:
            return found
    return _unpaired(ours, theirs, relative)


def require_same_counts(result: EvalResult, record: QualityRecord) -> None:
    """MismatchError unless both scored the same numbers of windows and tokens."""
    ran = result.conditions
    for name, ours in (("windows", ran.n_windows), ("tokens", ran.n_tokens)):
        theirs = record.counts.get(name)
        if theirs != ours:
            raise MismatchError(
                f"baseline: {record.where}: {theirs} {name} of the same text, here {ours}",
                hint="measure the baseline again with this tolkit",
            )


def _exact(result: EvalResult, record: QualityRecord, name: str, relative: bool) -> Change | None:
    ours, theirs = (
        (result.table_bytes, record.table_bytes)
        if name == "bytes"
        else (result.bits_per_value, record.bits_per_value)
    )
    if ours is None or theirs is None or not theirs > 0 or not math.isfinite(ours):
        return None
    exact = Fraction(ours) / Fraction(theirs) - 1 if relative else Fraction(ours) - Fraction(theirs)
    return Change(float(theirs), float(exact), float(exact), float(exact), True, exact)


def _sums(
    windows: WindowSums | None, record: QualityRecord
) -> Mapping[str, tuple[Floats, Floats]] | None:
    """Ours and theirs by kind, rounded alike, so that equal runs differ by nothing at all."""
    if windows is None or "nll_nats" not in record.window_sums:
        return None
    kinds = {
        "nll": (windows.nll_W, "nll_nats", "ppl_token"),
        "kl": (windows.kl_W, "kl_nats", "kl_mean_nats"),
        "agreeing": (windows.agreeing_W, "agreeing_tokens", "top1_agreement"),
    }
    pair = {}
    for kind, (ours_W, key, metric) in kinds.items():
        if ours_W is None or key not in record.window_sums:
            continue
        theirs_W = np.array(record.window_sums[key], dtype=np.float64)
        _require_consistent(record, metric, theirs_W, windows)
        pair[kind] = (rounded(ours_W), theirs_W)
    return pair


def _require_consistent(
    record: QualityRecord, metric: str, sums_W: Floats, windows: WindowSums
) -> None:
    """DataError when a record's sums give another value than the record states."""
    mean = float(sums_W.sum()) / float(windows.tokens_W.sum())
    stated = record.metrics.get(metric)
    expected = math.nan if stated is None else stated.value
    found = math.exp(min(mean, 700.0)) if metric == "ppl_token" else mean
    if not math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-12):
        raise DataError(
            f"baseline: {record.where}: window_sums give {metric} {found:.6g}, "
            f"the record says {expected:.6g}",
            hint="the record was changed: measure the baseline again",
        )


def _paired(
    name: str,
    relative: bool,
    windows: WindowSums,
    pair: Mapping[str, tuple[Floats, Floats]],
    against: float,
) -> Change | None:
    """None for what window sums do not decide (quantiles)."""
    estimate = None
    if name in _PERPLEXITIES or name == "bits_per_byte":
        size_W = {"ppl_token": windows.tokens_W, "ppl_word": windows.words_W}.get(
            name, windows.bytes_W
        )
        ours_W, theirs_W = pair["nll"]
        if name == "bits_per_byte" and relative:
            estimate = _relative(ours_W, theirs_W)
        elif name == "bits_per_byte":
            estimate = ratio_estimate(ours_W - theirs_W, size_W).scaled(1 / math.log(2))
        elif relative:
            estimate = ratio_estimate(ours_W - theirs_W, size_W).exponential(minus=1.0)
        else:
            estimate = _difference_of_exponentials(ours_W, theirs_W, size_W)
    elif name == "ppl_increase" and windows.reference_nll_W is not None:
        ours_W, theirs_W = (nll_W - rounded(windows.reference_nll_W) for nll_W in pair["nll"])
        estimate = _difference_of_exponentials(ours_W, theirs_W, windows.tokens_W)
    elif name == "kl_mean_nats" and "kl" in pair:
        ours_W, theirs_W = pair["kl"]
        difference = ratio_estimate(ours_W - theirs_W, windows.tokens_W)
        estimate = _relative(ours_W, theirs_W) if relative else difference
    elif name == "top1_agreement" and "agreeing" in pair:
        ours_W, theirs_W = pair["agreeing"]
        estimate = ratio_estimate(ours_W - theirs_W, windows.tokens_W)
    if estimate is None:
        return None
    if len(windows.tokens_W) < 2:
        return Change(against, estimate.value, -math.inf, math.inf, True)
    return Change(against, estimate.value, estimate.low, estimate.high, True)


def _relative(ours_W: Floats, theirs_W: Floats) -> Estimate:
    """sum(ours) / sum(theirs) - 1; infinite where something is compared with nothing."""
    if not theirs_W.any():
        far = Estimate(math.inf, math.nan, math.inf, math.inf)
        return far if ours_W.any() else _NOTHING
    ratio = ratio_estimate(ours_W, theirs_W)
    return Estimate(ratio.value - 1, ratio.se, ratio.low - 1, ratio.high - 1)


def _difference_of_exponentials(ours_W: Floats, theirs_W: Floats, size_W: Floats) -> Estimate:
    """exp(sum ours / sum size) - exp(sum theirs / sum size), its error by the delta method."""
    total = float(size_W.sum())
    value, influence_W = 0.0, np.zeros(len(size_W))
    for sums_W, sign in ((ours_W, 1.0), (theirs_W, -1.0)):
        mean = float(sums_W.sum()) / total if total > 0 else math.nan
        level = math.exp(mean) if mean < 709.0 else math.inf
        value += sign * level
        influence_W += sign * level * (sums_W - mean * size_W) / total
    if not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    windows = len(size_W)
    if windows < 2:
        return Estimate(value, math.nan, -math.inf, math.inf)
    se = math.sqrt(windows / (windows - 1) * float((influence_W**2).sum()))
    reach = student_t_975(windows - 1) * se
    return Estimate(value, se, value - reach, value + reach)


def _of_task(result: EvalResult, record: QualityRecord, name: str, relative: bool) -> Change | None:
    """A task's metric; its items are paired where both say how each came out."""
    task, _, metric = name.partition(".")
    ours, theirs = result.tasks.get(task), record.task_digests.get(task)
    if ours is None or theirs is None:
        return None  # nothing says on which items it was measured
    if ours.digest != theirs:
        raise MismatchError(
            f"baseline: {record.where}: other items of task {task}, "
            f"digest {theirs[:16]}, here {ours.digest[:16]}",
            hint="give the task file the baseline was measured with",
        )
    mine, other = ours.outcomes.get(metric), record.outcomes.get(name)
    value, against = result.metrics[name], record.metrics[name]
    if not relative and mine and other and _means(mine, value.value, other, against.value):
        ours_N, theirs_N = (np.array([*map(int, text)], np.float64) for text in (mine, other))
        found = paired_share_estimate(ours_N, theirs_N)
        if record.bundle == result.identity and mine == other:
            found = _NOTHING  # the same bundle again, item by item
        return Change(against.value, found.value, found.low, found.high, True)
    return _unpaired(value, against, relative)


def _means(mine: str, value: float, other: str, against: float) -> bool:
    """Whether two equally long strings of 0 and 1 are what the two values are the means of."""
    return len(mine) == len(other) and all(
        math.isclose(text.count("1") / len(text), mean, rel_tol=1e-9, abs_tol=1e-9)
        for text, mean in ((mine, value), (other, against))
    )


def _recorded(metric: Metric) -> RecordedMetric:
    return RecordedMetric(metric.value, metric.se, metric.n, *metric.interval)


def _unpaired(ours: Metric, theirs: RecordedMetric, relative: bool) -> Change:
    """Both intervals at their worst: right at 95 % whatever the correlation of the two."""
    (low, high), (their_low, their_high) = ours.interval, (theirs.low, theirs.high)
    if not relative:
        value = ours.value - theirs.value
        return Change(theirs.value, value, low - their_high, high - their_low, False)
    if not theirs.value > 0:
        value = 0.0 if ours.value == theirs.value == 0 else math.inf
        return Change(theirs.value, value, -math.inf, math.inf, False)
    value = ours.value / theirs.value - 1
    if not (their_low > 0 and math.isfinite(low) and math.isfinite(high)):
        return Change(theirs.value, value, -math.inf, math.inf, False)
    ratios = [a / b - 1 for a in (low, high) for b in (their_low, their_high)]
    return Change(theirs.value, value, min(ratios), max(ratios), False)
