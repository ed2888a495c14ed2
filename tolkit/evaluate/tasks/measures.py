"""Outcomes to metrics: over items, with the error of items drawn at random; changes paired.

N items. Every metric is a ratio of two sums over items, or a function of one, so one influence
value an item (how far it pulls the metric) gives the error of the metric and, subtracted item by
item, that of a difference between two models on the same items. For a mean this is the sample
standard error with n - 1; for perplexities it is the delta method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit.errors import MismatchError
from tolkit.evaluate.estimates import (
    Estimate,
    paired_share_estimate,
    ratio_estimate,
    share_estimate,
    student_t_975,
)
from tolkit.evaluate.result import Metric, metric_of
from tolkit.evaluate.tasks.outcomes import Outcome

__all__ = ["METRICS", "change_metrics", "task_metrics"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Measure:
    """A metric as `form`(sum of numerators / sum of denominators).

    form: ``share`` (of items that hit), ``exp`` (a perplexity) or ``bits`` (nats to bits).
    """

    numerator: Callable[[Outcome], float]
    denominator: Callable[[Outcome], float] = lambda outcome: 1.0
    form: str = "share"

    def sums(self, outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
        """Numerators and denominators [N]; NaN for outcomes that are not finite."""
        above = [self.numerator(o) if o.is_finite else math.nan for o in outcomes]
        return np.array(above, np.float64), np.array([*map(self.denominator, outcomes)], np.float64)

    def estimate(self, outcomes: Sequence[Outcome]) -> Estimate:
        if self.form == "share":
            return share_estimate(self.sums(outcomes)[0])
        ratio = ratio_estimate(*self.sums(outcomes))
        if self.form == "exp":
            return ratio.exponential()
        return ratio.scaled(1 / math.log(2)) if self.form == "bits" else ratio

    def influence(self, outcomes: Sequence[Outcome]) -> Floats:
        """How far each item pulls the metric [N]."""
        above_N, below_N = self.sums(outcomes)
        ratio = above_N.sum() / below_N.sum()
        slope = {"bits": 1 / math.log(2), "exp": self.estimate(outcomes).value}
        pulls_N: Floats = slope[self.form] * (above_N - ratio * below_N) / below_N.mean()
        return pulls_N


def _nats(outcome: Outcome) -> float:
    return -outcome.log_likelihoods[0]


def _words(outcome: Outcome) -> float:
    return outcome.n_words


def _bytes(outcome: Outcome) -> float:
    return outcome.n_bytes


def _right(outcome: Outcome) -> float:
    if outcome.gold is None:
        return float(bool(outcome.greedy))
    return float(outcome.choice == outcome.gold)


def _right_by_character(outcome: Outcome) -> float:
    return float(outcome.choice_norm == outcome.gold)


METRICS: Mapping[str, _Measure] = {
    "acc": _Measure(_right),
    "acc_norm": _Measure(_right_by_character),
    "perplexity": _Measure(_nats, form="exp"),
    "ppl_word": _Measure(_nats, _words, "exp"),
    "ppl_byte": _Measure(_nats, _bytes, "exp"),
    "bits_per_byte": _Measure(_nats, _bytes, "bits"),
}


def task_metrics(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Metric]:
    """Metrics of one model: value, standard error and 95 % interval over items.

    One outcome that is not finite makes all of them NaN; with one item the error is NaN.
    """
    return {
        name: metric_of(METRICS[name].estimate(outcomes), _count(METRICS[name], outcomes))
        for name in names
    }


def hits(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Metric -> one 0 or 1 an item, for those of `names` that are the share of items got right."""
    rights = {"acc": _right, "acc_norm": _right_by_character}
    return {
        name: "".join(str(int(right(outcome))) for outcome in outcomes)
        for name, right in rights.items()
        if name in names and all(outcome.is_finite for outcome in outcomes)
    }


def change_metrics(
    names: Sequence[str], outcomes: Sequence[Outcome], baseline: Sequence[Outcome]
) -> dict[str, Metric]:
    """`<metric>_change`, this minus baseline, with the paired error over items.

    Also ``choice_agreement``, the share of items with the same choice (for an expected word: both
    or neither greedy), where there are choices. The baseline may come from a stored result of a
    task with the same digest.

    Raises:
        MismatchError: another number of items than the baseline has.
    """
    if len(outcomes) != len(baseline):
        raise MismatchError(f"baseline: expected {len(outcomes)} items, got {len(baseline)}")
    found = {}
    for name in names:
        measure = METRICS[name]
        if measure.form == "share":
            change = paired_share_estimate(measure.sums(outcomes)[0], measure.sums(baseline)[0])
        else:
            value = measure.estimate(outcomes).value - measure.estimate(baseline).value
            change = _around(value, measure.influence(outcomes) - measure.influence(baseline))
        found[f"{name}_change"] = metric_of(change, _count(measure, outcomes))
    if "acc" in names:
        same_N = np.array([_same_choice(*pair) for pair in zip(outcomes, baseline, strict=True)])
        found["choice_agreement"] = metric_of(share_estimate(same_N), len(same_N))
    return found


def _around(value: float, pulls_N: Floats) -> Estimate:
    """An estimate with the error of a mean of `pulls_N`."""
    spread = ratio_estimate(pulls_N, np.ones(len(pulls_N)))
    if not math.isfinite(value) or math.isnan(spread.value):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    if len(pulls_N) < 2:
        return Estimate(value, math.nan, -math.inf, math.inf)
    reach = student_t_975(len(pulls_N) - 1) * spread.se
    return Estimate(value, spread.se, value - reach, value + reach)


def _same_choice(outcome: Outcome, other: Outcome) -> float:
    if not (outcome.is_finite and other.is_finite):
        return math.nan
    return float((outcome.choice, outcome.greedy) == (other.choice, other.greedy))


def _count(measure: _Measure, outcomes: Sequence[Outcome]) -> int:
    return round(sum(map(measure.denominator, outcomes)))
