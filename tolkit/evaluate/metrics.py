"""Sums over the tokens of each window, and the metrics they become.

W windows, N tokens; everything in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit.evaluate.estimates import ratio_estimate
from tolkit.evaluate.quantiles import QuantileSketch
from tolkit.evaluate.result import Metric, metric_of
from tolkit.evaluate.scoring import PositionScores
from tolkit.evaluate.windows import Windows

__all__ = ["Tally", "TextSizes", "comparison_metrics", "perplexity_metrics"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextSizes:
    """Scored tokens, words and bytes of each window, float64 [W]."""

    tokens_W: Floats
    words_W: Floats
    bytes_W: Floats

    @classmethod
    def of(cls, windows: Windows) -> TextSizes:
        """Of all windows of a text."""
        return cls(windows.scored_W.astype(np.float64), windows.words_W, windows.bytes_W)


class Tally:
    """Running sums of one model, float64 [W]; mutated by `add`.

    nll_W, kl_W: nats. agreeing_W: tokens where the top token is the reference's. greedy_W: tokens
    that have the largest logit themselves. flat_tokens: tokens where all logits are equal, [1].

    Args:
        windows: W.
        compared: with a reference beside it.
    """

    def __init__(self, windows: int, *, compared: bool = False) -> None:
        self.nll_W = np.zeros(windows)
        self.kl_W = np.zeros(windows)
        self.agreeing_W = np.zeros(windows)
        self.greedy_W = np.zeros(windows)
        self.flat_tokens = np.zeros(1, np.int64)
        self.kl_quantiles = QuantileSketch(windows) if compared else None

    def add(self, scores: PositionScores, window_N: npt.NDArray[np.int64]) -> None:
        """Take in the scores of some tokens; `window_N` says which window each belongs to."""
        self._sum(self.nll_W, scores.nll.cpu().numpy(), window_N)
        self._sum(self.greedy_W, scores.greedy.cpu().numpy(), window_N)
        self.flat_tokens += int(scores.flat.sum())
        if scores.kl is None or scores.agrees is None or self.kl_quantiles is None:
            return
        kl_N = scores.kl.cpu().numpy()
        # A comparison with a NaN is false; it must not count as an honest disagreement.
        agrees_N = np.where(np.isfinite(kl_N), scores.agrees.cpu().numpy(), np.nan)
        self._sum(self.kl_W, kl_N, window_N)
        self._sum(self.agreeing_W, agrees_N, window_N)
        self.kl_quantiles.add(kl_N, window_N)

    @staticmethod
    def _sum(into_W: Floats, values_N: Floats, window_N: npt.NDArray[np.int64]) -> None:
        into_W += np.bincount(window_N, weights=values_N, minlength=len(into_W))

    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """What adds up when several processes scored different windows."""
        sums = (self.nll_W, self.kl_W, self.agreeing_W, self.greedy_W, self.flat_tokens)
        return sums if self.kl_quantiles is None else (*sums, *self.kl_quantiles.arrays())

    def first_bad_window(self) -> int | None:
        """The first window where this model gave a NaN or infinite logit; None when none did."""
        bad = np.flatnonzero(~np.isfinite(self.nll_W))
        return int(bad[0]) if len(bad) else None


def perplexity_metrics(tally: Tally, sizes: TextSizes) -> dict[str, Metric]:
    """ppl_token, ppl_word, ppl_byte and bits_per_byte of one model."""
    n_tokens, n_words, n_bytes = (
        round(float(of_W.sum())) for of_W in (sizes.tokens_W, sizes.words_W, sizes.bytes_W)
    )
    by_byte = ratio_estimate(tally.nll_W, sizes.bytes_W)
    return {
        "ppl_token": metric_of(ratio_estimate(tally.nll_W, sizes.tokens_W).exponential(), n_tokens),
        "ppl_word": metric_of(ratio_estimate(tally.nll_W, sizes.words_W).exponential(), n_words),
        "ppl_byte": metric_of(by_byte.exponential(), n_bytes),
        "bits_per_byte": metric_of(by_byte.scaled(1 / math.log(2)), n_bytes),
    }


def comparison_metrics(candidate: Tally, reference: Tally, sizes: TextSizes) -> dict[str, Metric]:
    """What the candidate lost against the reference on the same tokens.

    ppl_increase is the ratio of token perplexities minus 1; its error is that of the paired
    difference, which is far smaller than that of either perplexity.
    """
    n = round(float(sizes.tokens_W.sum()))
    paired = ratio_estimate(candidate.nll_W - reference.nll_W, sizes.tokens_W)
    assert candidate.kl_quantiles is not None
    return {
        "ppl_increase": metric_of(paired.exponential(minus=1.0), n),
        "kl_mean_nats": metric_of(ratio_estimate(candidate.kl_W, sizes.tokens_W), n),
        "kl_median_nats": metric_of(candidate.kl_quantiles.estimate(0.5), n),
        "kl_p99_nats": metric_of(candidate.kl_quantiles.estimate(0.99), n),
        "top1_agreement": metric_of(ratio_estimate(candidate.agreeing_W, sizes.tokens_W), n),
    }
