"""A bound on measured quality, met only when the measurement's whole interval meets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tolkit.errors import UsageError

__all__ = ["Bound"]


@dataclass(frozen=True)
class Bound:
    """One of the two.

    Attributes:
        max_kl: on the mean KL divergence from the reference, in nats.
        max_ppl_increase: on the change of token perplexity, a ratio: 0.004 is 0.4 %.

    It holds when the upper end of the two-sided 95 % interval meets it, as a gate of `tol eval`
    passes.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if (self.max_kl is None) == (self.max_ppl_increase is None):
            raise UsageError("max_kl: give exactly one of max_kl and max_ppl_increase")
        for name, limit in self.to_history().items():
            if not 0 < limit < float("inf"):
                raise UsageError(f"{name}: expected a finite bound above 0, got {limit}")

    @property
    def metric(self) -> Literal["kl_mean_nats", "ppl_increase"]:
        """Name of what is bounded, as evaluations report it."""
        return "ppl_increase" if self.max_kl is None else "kl_mean_nats"

    @property
    def name(self) -> str:
        """Name of the option."""
        return "max_ppl_increase" if self.max_kl is None else "max_kl"

    @property
    def limit(self) -> float:
        """Nats, or a ratio."""
        limit = self.max_ppl_increase if self.max_kl is None else self.max_kl
        assert limit is not None
        return limit

    def holds(self, upper_end: float) -> bool:
        """Whether an interval that ends there meets the bound; never for NaN."""
        return upper_end <= self.limit

    def said(self) -> str:
        """In words: "KL 0.004 nats"."""
        if self.max_kl is not None:
            return f"KL {self.max_kl:g} nats"
        return f"{100 * self.limit:g} % of perplexity"

    def to_history(self) -> dict[str, float]:
        """Name and limit."""
        asked = {"max_kl": self.max_kl, "max_ppl_increase": self.max_ppl_increase}
        return {name: limit for name, limit in asked.items() if limit is not None}
