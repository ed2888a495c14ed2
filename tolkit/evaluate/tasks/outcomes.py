"""What one model did with each item: log-likelihoods, and the choice they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit.evaluate.tasks.base import Item, TaskItem
from tolkit.evaluate.tasks.requests import Requests

__all__ = ["Outcome", "outcomes_of"]


@dataclass(frozen=True)
class Outcome:
    """One item under one model.

    log_likelihoods: nats of each choice; one alone for an expected word or a page.
    gold, choice, choice_norm: index of the right choice, of the likeliest, and of the likeliest
        by character; the lowest of equal ones; None where there is no choice.
    greedy: each token of the expected word was the likeliest (ties included); None elsewhere.
    n_words, n_bytes: of a page's scored text; 0 elsewhere.
    """

    log_likelihoods: tuple[float, ...]
    gold: int | None = None
    choice: int | None = None
    choice_norm: int | None = None
    greedy: bool | None = None
    n_words: float = 0.0
    n_bytes: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether every log-likelihood is a number."""
        return all(math.isfinite(value) for value in self.log_likelihoods)

    def to_json(self) -> dict[str, Any]:
        """An object of the fields that say something; log-likelihoods that are none as null."""
        scores = [value if math.isfinite(value) else None for value in self.log_likelihoods]
        fields: dict[str, Any] = {"log_likelihoods": scores}
        for name in ("gold", "choice", "choice_norm", "greedy"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if self.n_bytes:
            fields |= {"n_words": self.n_words, "n_bytes": self.n_bytes}
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Outcome:
        """What `to_json` wrote."""
        scores = [math.nan if value is None else value for value in fields["log_likelihoods"]]
        return cls(**{**fields, "log_likelihoods": tuple(scores)})


def outcomes_of(
    items: Sequence[TaskItem],
    requests: Requests,
    nll_W: npt.NDArray[np.float64],
    greedy_W: npt.NDArray[np.float64],
) -> tuple[Outcome, ...]:
    """One outcome an item.

    Args:
        items: what `requests` were made of.
        nll_W: nats over the scored tokens of each window of `requests`.
        greedy_W: how many of these tokens had the largest logit.
    """
    found = []
    for item, windows, share in zip(items, requests.of_item, requests.scored_share, strict=True):
        scores = tuple(-float(nll_W[i]) for i in windows)
        if not isinstance(item, Item):
            found.append(
                Outcome((sum(scores),), n_words=item.n_words * share, n_bytes=item.n_bytes * share)
            )
        elif item.gold is None:
            (i,) = windows
            found.append(Outcome(scores, greedy=bool(greedy_W[i] == requests.windows[i].scored)))
        else:
            found.append(_choice(scores, item.lengths, item.gold))
    return tuple(found)


def _choice(scores: tuple[float, ...], lengths: tuple[int, ...], gold: int) -> Outcome:
    # An empty choice has no score by character and is never the likeliest.
    by_character = [
        score / length if length else -math.inf
        for score, length in zip(scores, lengths, strict=True)
    ]
    return Outcome(
        scores, gold, choice=int(np.argmax(scores)), choice_norm=int(np.argmax(by_character))
    )
