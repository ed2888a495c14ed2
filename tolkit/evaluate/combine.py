"""One result out of text, tasks and the harness's tasks, so that reports and gates see all of it.

Metrics of a task are called `task.metric`; those of lm-evaluation-harness `lm_eval_task.metric`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from tolkit.evaluate.lm_eval.result import HarnessResult
from tolkit.evaluate.result import EvalResult, Metric, TaskItems
from tolkit.evaluate.tasks import TaskResult
from tolkit.evaluate.tasks.measures import hits

__all__ = ["with_harness", "with_tasks"]


def with_tasks(result: EvalResult, tasks: Sequence[TaskResult]) -> EvalResult:
    """`result` with the metrics, items and problems of the same candidate's tasks."""
    metrics, partners = dict(result.metrics), dict(result.reference_metrics)
    items, problems = dict(result.tasks), list(result.problems)
    for task in tasks:
        metrics |= {f"{task.task}.{name}": metric for name, metric in task.metrics.items()}
        partners |= {f"{task.task}.{name}": m for name, m in task.reference_metrics.items()}
        items[task.task] = TaskItems(task.digest, hits(tuple(task.metrics), task.outcomes))
        problems += [problem for problem in task.problems if problem not in problems]
    return dataclasses.replace(
        result,
        metrics=metrics,
        reference_metrics=partners,
        tasks=items,
        problems=tuple(problems),
    )


def with_harness(
    result: EvalResult, harness: HarnessResult, reference: HarnessResult | None
) -> EvalResult:
    """`result` with what lm-evaluation-harness measured, the reference's figures beside."""
    partners = {} if reference is None else _named(reference)
    return dataclasses.replace(
        result,
        metrics={**result.metrics, **_named(harness)},
        reference_metrics={**result.reference_metrics, **partners},
    )


def _named(harness: HarnessResult) -> dict[str, Metric]:
    return {
        f"lm_eval_{_word(task)}.{_word(name)}": metric
        for task, of_task in harness.tasks.items()
        for name, metric in of_task.metrics.items()
    }


def _word(name: str) -> str:
    """A name as gates and schemas take it: lower-case letters, digits, underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
