"""What a task found for one model, and everything it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tolkit.evaluate.result import Metric
from tolkit.evaluate.tasks.outcomes import Outcome

__all__ = ["TaskConditions", "TaskResult"]


@dataclass(frozen=True)
class TaskConditions:
    """What a task was run on; results compare only when these are equal.

    window_length: tokens a model read at once.
    prefix_id: what stood before texts without context; None for nothing.
    truncated: items of which some context was cut off on the left.
    """

    tokenizer_digest: str
    window_length: int
    prefix_id: int | None
    truncated: int
    n_tokens: int
    device: str
    dtype: str


@dataclass(frozen=True)
class TaskResult:
    """One candidate on one task.

    label, identity, reference_identity: as in EvalResult.
    version, digest: of the task's definition and of its items.
    n: items.
    metrics: name -> metric over items (`tolkit.evaluate.tasks.measures`); with a reference also
        `<metric>_change` and, where there are choices, choice_agreement.
    reference_metrics: those of the reference on the same items.
    outcomes, reference_outcomes: one an item, in order.
    problems: reasons to trust nothing here (NaN logits, a model that says nothing).
    """

    task: str
    version: str
    digest: str
    n: int
    label: str
    identity: str
    reference_identity: str | None
    metrics: Mapping[str, Metric]
    reference_metrics: Mapping[str, Metric]
    outcomes: tuple[Outcome, ...]
    reference_outcomes: tuple[Outcome, ...]
    conditions: TaskConditions
    problems: tuple[str, ...] = ()
