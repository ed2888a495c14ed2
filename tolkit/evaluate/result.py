"""What an evaluation found: numbers, their errors, and everything they depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tolkit.evaluate.estimates import Estimate

__all__ = [
    "METRIC_NAMES",
    "Conditions",
    "EvalResult",
    "Metric",
    "TaskItems",
    "WindowSums",
    "metric_of",
    "rounded",
]

Floats = npt.NDArray[np.float64]
_DIGITS = 9

# Names and order in every report.
METRIC_NAMES = (
    "ppl_token",
    "ppl_word",
    "ppl_byte",
    "bits_per_byte",
    "ppl_increase",
    "kl_mean_nats",
    "kl_median_nats",
    "kl_p99_nats",
    "top1_agreement",
)


@dataclass(frozen=True)
class Metric:
    """A measured value.

    se: standard error over windows; NaN when there is only one.
    n: what the value is an average over: tokens, words (ppl_word) or bytes (ppl_byte,
        bits_per_byte).
    low, high: two-sided 95 % interval; value -+ 1.96 se where None.
    """

    value: float
    se: float
    n: int
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided 95 % interval; infinite ends when the error is unknown."""
        reach = 1.96 * self.se if math.isfinite(self.se) else math.inf
        return (
            self.value - reach if self.low is None else self.low,
            self.value + reach if self.high is None else self.high,
        )


def metric_of(estimate: Estimate, n: int) -> Metric:
    """An estimate as a metric over `n` tokens, words or bytes."""
    return Metric(estimate.value, estimate.se, n, estimate.low, estimate.high)


@dataclass(frozen=True)
class Conditions:
    """What an evaluation was run on; two results compare only when these are equal.

    versions: package name -> version.
    """

    text_digest: str
    tokenizer_digest: str
    window_length: int
    packed: bool
    prefix_id: int | None
    n_documents: int
    n_windows: int
    n_tokens: int
    n_bytes: int
    n_words: int
    device: str
    dtype: str
    versions: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class WindowSums:
    """What paired comparisons need of each window: sums over its scored tokens, float64 [W].

    tokens_W, words_W, bytes_W: how much was scored.     nll_W, kl_W: nats.
    agreeing_W: tokens where the top token is the reference's. None without a reference.
    """

    tokens_W: Floats
    words_W: Floats
    bytes_W: Floats
    nll_W: Floats
    reference_nll_W: Floats | None = None
    kl_W: Floats | None = None
    agreeing_W: Floats | None = None


def rounded(sums_W: Floats) -> Floats:
    """To 9 significant digits, as records keep window sums."""
    return np.array([float(f"{value:.{_DIGITS}g}") for value in sums_W.tolist()])


@dataclass(frozen=True)
class TaskItems:
    """What paired comparisons need of a task.

    digest: of its items, in order; two results of a task compare only when these are equal.
    outcomes: metric (``acc``) -> one 0 or 1 an item, where the metric is their mean.
    """

    digest: str
    outcomes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Quality of one candidate.

    label: how messages and reports call it.
    metrics: name (METRIC_NAMES, then ``task.metric``) -> metric; comparisons only with a
        reference.
    reference_metrics: the perplexities of the reference on the same tokens.
    noise_floor: KL(reference in float32 || reference in `conditions.dtype`) on some of the
        windows, in nats; None in float32. Differences below it are the number format's.
    problems: reasons to trust nothing here (NaN logits, a model that says nothing); no gate
        passes when there are any.
    table_bytes, bits_per_value: size of the tables, where the candidate has any.
    timings_s: seconds by part; "pass" is all of it, every model together.
    windows: sums of every window, for paired comparisons; None where they were not kept.
    tasks: task -> its items, for those in `metrics`.
    """

    label: str
    identity: str
    kind: str
    reference_identity: str | None
    metrics: Mapping[str, Metric]
    reference_metrics: Mapping[str, Metric]
    conditions: Conditions
    noise_floor: Metric | None = None
    problems: tuple[str, ...] = ()
    table_bytes: int | None = None
    bits_per_value: float | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    windows: WindowSums | None = field(default=None, compare=False, repr=False)
    tasks: Mapping[str, TaskItems] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float | None:
        """Scored tokens a second of the pass, all models together."""
        elapsed_s = self.timings_s.get("pass", 0.0)
        return self.conditions.n_tokens / elapsed_s if elapsed_s > 0 else None
