"""The paper's tasks beside perplexity: columns of accuracy for every point."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tolkit.evaluate.tasks import TASKS, TaskResult, evaluate_tasks
from tolkit.study.context import Context
from tolkit.study.fields import Field, cell_text
from tolkit.study.store import Point
from tolkit.tables import Runnable

__all__ = ["task_fields", "task_points", "tasks_text"]


def task_points(
    context: Context,
    reference: Runnable,
    runnables: Sequence[Runnable],
    labels: Sequence[str],
    tables: str,
) -> list[dict[str, Any]]:
    """For each variant the metrics of all tasks, with standard errors over items and the model's
    own as it is; nothing without tasks."""
    if not context.tasks:
        return [{} for _ in runnables]
    spec = context.spec
    results = evaluate_tasks(
        runnables,
        reference,
        context.tasks,
        dtype=spec.dtype,
        device=spec.device,
        batch_tokens=spec.batch_tokens,
        tables=tables,
        progress=context.progress,
        labels=labels,
    )
    for result in (one for of_variant in results for one in of_variant):
        for problem in result.problems:
            context.progress.warn(problem)
    return [_facts(of_variant) for of_variant in results]


def _facts(results: Sequence[TaskResult]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for result in results:
        found[f"{result.task}_items"] = result.n
        for name in TASKS[result.task].metrics:
            key = f"{result.task}_{name}"
            found[key], found[f"{key}_se"] = result.metrics[name].value, result.metrics[name].se
            found[f"{key}_reference"] = result.reference_metrics[name].value
    return found


def task_fields(names: Sequence[str]) -> tuple[Field, ...]:
    """A column a task: accuracy, or the first metric of a task that has none."""
    fields = []
    for name in names:
        metrics = TASKS[name].metrics
        if "acc" in metrics:
            fields.append(Field(f"{name}_acc", name, "percent", with_se=True))
        else:
            title = f"{name} {metrics[0]}"
            fields.append(Field(f"{name}_{metrics[0]}", title, "number", with_se=True))
    return tuple(fields)


def tasks_text(names: Sequence[str], point: Point) -> str:
    """What the model as it is scores, with n, in words; empty without tasks."""
    scores = []
    for name, field in zip(names, task_fields(names), strict=True):
        own = dataclasses.replace(field, key=f"{field.key}_reference")
        scores.append(f"{field.title} {cell_text(own, point)} (n {point[f'{name}_items']:,})")
    return ", ".join(scores)
