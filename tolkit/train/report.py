"""What a finished run measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HeldOut", "TrainReport"]


@dataclass(frozen=True)
class HeldOut:
    """Mean -log p on held-out text, in nats a token, its standard error over `windows`."""

    loss: float
    loss_se: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class TrainReport:
    """One run.

    out: the checkpoint. steps, tokens: trained in all. resumed_step: 0, or where this process
    took over. elapsed_s, tokens_per_s: of this process, evaluation left out of the rate.
    train_loss: mean cross-entropy of the last steps (at most 20), nats. held_out: None where no
    text is held out. distinct_ids: mean a step. dtype: of matrix products.
    """

    out: Path
    architecture: str
    parameters: int
    vocab_size: int
    steps: int
    tokens: int
    resumed_step: int
    elapsed_s: float
    tokens_per_s: float
    train_loss: float
    held_out: HeldOut | None
    distinct_ids: float
    dtype: str
    device: str
    warnings: tuple[str, ...]
