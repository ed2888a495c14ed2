"""What a finished run measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HeldOut", "TrainReport"]


@dataclass(frozen=True)
class HeldOut:
    """Mean -log p on held-out text, in nats a token, its standard error over `windows`.

    kl: mean KL(teacher || model) there, None without a teacher.
    """

    loss: float
    loss_se: float
    tokens: int
    windows: int
    kl: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class TrainReport:
    """One run.

    out: the checkpoint, or the bundle, whose identity is not None then. trained_parameters: those
    that were not frozen; tuned: they are numbers of the tables, not the model's. steps, tokens:
    trained in all. resumed_step: 0, or where this process took over. elapsed_s, tokens_per_s: of
    this process, evaluation left out of the rate. train_loss: mean cross-entropy of the last steps
    (at most 20), nats. held_out: None where no text is held out; before: the same ahead of the
    first step, of a model that goes on with frozen or tuned tables or a teacher. learning_rate:
    the peak. distinct_ids: mean a step. dtype: of matrix products.
    """

    out: Path
    identity: str | None
    architecture: str
    parameters: int
    trained_parameters: int
    tuned: bool
    vocab_size: int
    steps: int
    tokens: int
    resumed_step: int
    elapsed_s: float
    tokens_per_s: float
    train_loss: float
    held_out: HeldOut | None
    before: HeldOut | None
    learning_rate: float
    distinct_ids: float
    dtype: str
    device: str
    warnings: tuple[str, ...]
