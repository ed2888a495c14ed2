"""What is asked of generation, and choosing the next token from a model's scores.

B rows of a batch, V vocabulary, S ids a row has seen. The order is the field's: repetition
penalty, temperature, top-k, top-p, min-p, each on what the one before left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolkit.errors import NonFiniteError, UsageError

__all__ = ["GenerateSpec", "Sampler", "filtered", "penalised"]

_CANDIDATES = 1024  # of V; top-p sorts these first, which nearly always hold its mass


@dataclass(frozen=True)
class GenerateSpec:
    """How to continue prompts.

    max_new_tokens: at most so many; None takes 128, or what the model's positions leave.
    temperature: scores are divided by it; 0 takes the likeliest token. None is 1 where a way of
        sampling is asked for (top_k, top_p, min_p) and 0 otherwise.
    top_k: only the k likeliest tokens, and those that tie with the last of them; None or 0: all.
    top_p: only the likeliest tokens that together reach this probability.
    min_p: only tokens at least this times as probable as the likeliest.
    repetition_penalty: scores of ids seen, prompt included, are divided by it where positive and
        multiplied where negative.
    seed: prompt i of a call draws from a stream of (seed, i), whatever else is in its batch.
    stop: texts before which a continuation ends; they are left out of it.
    ignore_eos: go on after the end-of-text token.
    batch: prompts decoded together.
    context: positions of the key-value cache; None takes what prompt and new tokens need. Where
        it is given, a continuation ends when it is full.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    batch: int = 8
    context: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens, "max_new_tokens", "at least 1", lambda n: n >= 1)
        _require(self.temperature, "temperature", "0 or above", lambda t: 0 <= t < math.inf)
        _require(self.top_k, "top_k", "0 (all) or above", lambda k: k >= 0)
        _require(self.top_p, "top_p", "above 0, at most 1", lambda p: 0 < p <= 1)
        _require(self.min_p, "min_p", "0 to 1", lambda p: 0 <= p <= 1)
        _require(
            self.repetition_penalty, "repetition_penalty", "above 0", lambda r: 0 < r < math.inf
        )
        _require(self.seed, "seed", "0 or above", lambda s: s >= 0)
        _require(self.batch, "batch", "at least 1", lambda b: b >= 1)
        _require(self.context, "context", "at least 2", lambda c: c >= 2)
        if any(not text for text in self.stop):
            raise UsageError("stop: an empty text would end at once")

    @property
    def heat(self) -> float:
        """The temperature that applies; 0 means greedy."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_k is None and self.top_p is None and self.min_p is None else 1.0


def _require(value: Any, name: str, expected: str, good: Callable[[Any], bool]) -> None:
    if value is not None and not good(value):
        raise UsageError(f"{name}: expected {expected}, got {value}")


def penalised(scores_BV: Tensor, seen_BS: Sequence[Tensor], penalty: float) -> Tensor:
    """Scores with those of seen ids made less likely (Keskar et al. 2019, section 4.1).

    Args:
        scores_BV: float32 [B, V]; unchanged.
        seen_BS: ids of each row, int64 of any length, repeats allowed (a repeat counts once).
    """
    result_BV = scores_BV.clone()
    for row_V, seen_S in zip(result_BV, seen_BS, strict=True):
        picked_S = row_V[seen_S]
        row_V[seen_S] = torch.where(picked_S < 0, picked_S * penalty, picked_S / penalty)
    return result_BV


def filtered(scores_BV: Tensor, spec: GenerateSpec) -> Tensor:
    """Scores over the temperature, -inf for tokens that top-k, top-p and min-p leave out.

    Args:
        scores_BV: float32 [B, V]; unchanged.
        spec: its `heat` must be above 0.
    """
    scores_BV = scores_BV / spec.heat
    if spec.top_k:
        k = min(spec.top_k, scores_BV.shape[-1])
        least_B1 = torch.topk(scores_BV, k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -math.inf)
    if spec.top_p is not None and spec.top_p < 1:
        scores_BV = _nucleus(scores_BV, spec.top_p)
    if spec.min_p:
        # A ratio of probabilities is a difference of scores.
        least_B1 = scores_BV.amax(-1, keepdim=True) + math.log(spec.min_p)
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -math.inf)
    return scores_BV


def _nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens of each row until `top_p` is reached, the one that reaches it too."""
    width = scores_BV.shape[-1]
    probabilities_BV = torch.softmax(scores_BV, -1, dtype=torch.float64)
    for count in (min(_CANDIDATES, width), width):
        best_BC, ids_BC = torch.topk(scores_BV, count, dim=-1)
        probabilities_BC = probabilities_BV.gather(-1, ids_BC)
        before_BC = probabilities_BC.cumsum(-1) - probabilities_BC
        if count == width or bool((before_BC[:, -1] >= top_p).all()):
            break
    kept_BC = best_BC.masked_fill(before_BC >= top_p, -math.inf)
    kept_BC[:, 0] = best_BC[:, 0]
    return torch.full_like(scores_BV, -math.inf).scatter_(-1, ids_BC, kept_BC)


class Sampler:
    """Chooses tokens for rows whose random streams depend on the seed and their own number only.

    A row draws one number a token, on the CPU, so the stream is the same on every device.

    Args:
        spec: what was asked.
        rows: number of each row of the batch, its prompt's index.
    """

    def __init__(self, spec: GenerateSpec, rows: Sequence[int]) -> None:
        self._spec = spec
        self._generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([spec.seed, row]).generate_state(1, np.uint64)[0] >> 1)
            )
            for row in rows
        ]

    @property
    def needs_seen(self) -> bool:
        """Whether `choose` looks at the ids seen."""
        return self._spec.repetition_penalty != 1

    def choose(self, scores_BV: Tensor, active: Sequence[int], seen: Sequence[Tensor]) -> list[int]:
        """One id for each row of a batch.

        Args:
            scores_BV: logits [B, V] on any device.
            active: which of the sampler's rows the B are.
            seen: ids of each of the B so far, for the repetition penalty; may be empty without.

        Raises:
            NonFiniteError: a NaN among a row's scores, or +inf.
        """
        scores_BV = scores_BV.float()
        if self.needs_seen:
            scores_BV = penalised(scores_BV, seen, self._spec.repetition_penalty)
        if self._spec.heat == 0:
            best_B, ids_B = scores_BV.max(-1)
            _require_finite(best_B)
            return [int(i) for i in ids_B.tolist()]
        _require_finite(scores_BV.amax(-1))
        weights_BV = torch.softmax(filtered(scores_BV, self._spec), -1, dtype=torch.float64)
        cumulative_BV = weights_BV.cumsum(-1)
        drawn = [torch.rand((), generator=self._generators[i], dtype=torch.float64) for i in active]
        totals_B = cumulative_BV[:, -1]
        at_B = torch.stack(drawn).to(totals_B.device) * totals_B
        # A product rounded up to the total would lie past the last token.
        at_B = torch.minimum(at_B, torch.nextafter(totals_B, torch.zeros_like(totals_B)))
        chosen_B1 = torch.searchsorted(cumulative_BV, at_B[:, None], right=True)
        return [int(i) for i in chosen_B1[:, 0].tolist()]


def _require_finite(best_B: Tensor) -> None:
    if not bool(torch.isfinite(best_B).all()):
        raise NonFiniteError(
            "model: its scores are not finite", hint="run tol verify, or use --dtype float32"
        )
