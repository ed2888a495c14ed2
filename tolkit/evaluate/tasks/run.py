"""Scoring tasks: all requests of all tasks in one pass, batched by length.

W windows of all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tolkit.errors import MismatchError, UsageError
from tolkit.evaluate.forward import ForwardPass, Machine
from tolkit.evaluate.partners import check_models
from tolkit.evaluate.runnable import Runnable, device_label
from tolkit.evaluate.tasks.measures import change_metrics, task_metrics
from tolkit.evaluate.tasks.outcomes import Outcome, outcomes_of
from tolkit.evaluate.tasks.registry import TASKS, TaskData
from tolkit.evaluate.tasks.requests import Requests, prefix_of, requests_of
from tolkit.evaluate.tasks.result import TaskConditions, TaskResult
from tolkit.evaluate.windows import Window
from tolkit.progress import Progress, TqdmProgress

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    candidates: Sequence[Runnable],
    reference: Runnable | None,
    tasks: Sequence[TaskData],
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    batch_tokens: int | None = None,
    tables: str = "auto",
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
    window: int | None = None,
    prefix_id: int | None = None,
) -> list[list[TaskResult]]:
    """Score tasks; log-likelihoods, choices and metrics are those of lm-evaluation-harness.

    Cost: one forward pass a model over every prompt with every choice.

    Args:
        candidates: one or more models. They are not changed.
        reference: scored once beside them, for changes and agreement; None for neither.
        tasks: from `load_task` or `find_tasks`.
        dtype, device, batch_tokens, tables, progress, labels: as `tolkit.evaluate.evaluate` says.
        window: tokens read at once; by default what all models can read.
        prefix_id: token that stands for an empty context; by default the tokenizer's bos, else
            its eos, else none (the first token is then context only).

    Returns:
        Per candidate, in order, one result a task. NaN or infinite logits make the metrics of a
        task NaN and are told in its `problems`.

    Raises:
        MismatchError: models with another tokenizer or vocabulary than the first.
        UsageError: no tasks, a window longer than a model's positions, or a continuation longer
            than the window.
        DataError: an item with nothing to score.
        ResourceError: no such device, or out of memory.
    """
    machine = Machine(device, dtype, batch_tokens, tables)
    progress = progress or TqdmProgress()
    names = list(labels) if labels is not None else [c.kind for c in candidates]
    assert len(names) == len(candidates)
    named = check_models(candidates, reference, names)
    if not tasks:
        raise UsageError("tasks: none given, expected at least one")
    plan = _plan(named, tasks, window, prefix_id)

    windows = plan.windows
    with machine.running():
        models = [machine.place(runnable) for _, runnable in named]
        run = ForwardPass(models, windows, machine, with_reference=False)
        with progress.task("tasks", sum(w.scored for w in windows), "token") as bar:
            run.run(range(len(windows)), progress, bar)
    scored = [
        _scored(label, runnable, plan, run.tallies[i].nll_W, run.tallies[i].greedy_W)
        for i, (label, runnable) in enumerate(named)
    ]
    beside = scored.pop(0) if reference is not None else None
    return [
        [_result(plan, index, machine, model, beside) for index in range(len(tasks))]
        for model in scored
    ]


@dataclass(frozen=True)
class _Plan:
    """Tasks with their requests; `firsts` is where each one's windows begin among all."""

    tasks: Sequence[TaskData]
    requests: Sequence[Requests]
    firsts: Sequence[int]
    window_length: int
    prefix_id: int | None

    @property
    def windows(self) -> list[Window]:
        return [window for requests in self.requests for window in requests.windows]


@dataclass(frozen=True)
class _Scored:
    """One model on all tasks."""

    label: str
    runnable: Runnable
    outcomes: Sequence[tuple[Outcome, ...]]
    problems: Sequence[list[str]]


def _plan(
    named: Sequence[tuple[str, Runnable]],
    tasks: Sequence[TaskData],
    window: int | None,
    prefix_id: int | None,
) -> _Plan:
    limit, tightest = min(
        (runnable.model.config.max_position_embeddings, label) for label, runnable in named
    )
    length = limit if window is None else window
    if not 1 <= length <= limit:
        raise UsageError(
            f"window: {length} tokens, {tightest} reads at most {limit}",
            hint=f"use --window {limit}",
        )
    _, first = named[0]
    vocabulary = first.model.config.vocab_size
    if prefix_id is None:
        prefix_id = prefix_of(first.tokenizer)
    elif not 0 <= prefix_id < vocabulary:
        raise UsageError(f"prefix_id: expected a token id below {vocabulary}, got {prefix_id}")
    requests = [requests_of(task.items, first.tokenizer, length, prefix_id) for task in tasks]
    for task, of_task in zip(tasks, requests, strict=True):
        largest = max(int(w.ids.max()) for w in of_task.windows)
        if largest >= vocabulary:
            raise MismatchError(
                f"{task.path}: gives token id {largest}, the models' vocabulary has {vocabulary} "
                "rows"
            )
    counts = [len(of_task.windows) for of_task in requests]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return _Plan(tasks, requests, firsts, length, prefix_id)


def _scored(
    label: str,
    runnable: Runnable,
    plan: _Plan,
    nll_W: npt.NDArray[np.float64],
    greedy_W: npt.NDArray[np.float64],
) -> _Scored:
    outcomes, problems = [], []
    for task, requests, first in zip(plan.tasks, plan.requests, plan.firsts, strict=True):
        here = slice(first, first + len(requests.windows))
        of_task = outcomes_of(task.items, requests, nll_W[here], greedy_W[here])
        outcomes.append(of_task)
        problems.append(
            _problems(label, task, requests, of_task, nll_W[here], runnable.model.config.vocab_size)
        )
    return _Scored(label, runnable, outcomes, problems)


def _problems(
    label: str,
    task: TaskData,
    requests: Requests,
    outcomes: Sequence[Outcome],
    nll_W: npt.NDArray[np.float64],
    vocabulary: int,
) -> list[str]:
    bad = next((i for i, outcome in enumerate(outcomes) if not outcome.is_finite), None)
    if bad is not None:
        return [f"{label}: NaN or infinite logits, first in {task.items[bad].where}"]
    scored_W = np.array([window.scored for window in requests.windows])
    # Equal logits say log V of every token, exactly but for the rounding of one logarithm.
    if np.allclose(nll_W, scored_W * math.log(vocabulary), rtol=1e-9, atol=0.0):
        return [f"{label}: all logits are equal at every position; the model says nothing"]
    choices = [outcome.log_likelihoods for outcome in outcomes if outcome.gold is not None]
    if choices and all(min(scores) == max(scores) for scores in choices):
        return [f"{label}: the choices of every item of {task.name} are equally likely"]
    return []


def _result(
    plan: _Plan, index: int, machine: Machine, model: _Scored, beside: _Scored | None
) -> TaskResult:
    task, requests = plan.tasks[index], plan.requests[index]
    names = TASKS[task.name].metrics
    outcomes = model.outcomes[index]
    metrics = task_metrics(names, outcomes)
    problems = list(model.problems[index])
    if beside is not None:
        metrics |= change_metrics(names, outcomes, beside.outcomes[index])
        problems += beside.problems[index]
    return TaskResult(
        task=task.name,
        version=task.version,
        digest=task.digest,
        n=len(task.items),
        label=model.label,
        identity=model.runnable.identity,
        reference_identity=None if beside is None else beside.runnable.identity,
        metrics=metrics,
        reference_metrics={} if beside is None else task_metrics(names, beside.outcomes[index]),
        outcomes=outcomes,
        reference_outcomes=() if beside is None else beside.outcomes[index],
        conditions=TaskConditions(
            tokenizer_digest=model.runnable.tokenizer.digest,
            window_length=plan.window_length,
            prefix_id=plan.prefix_id,
            truncated=requests.truncated,
            n_tokens=sum(window.scored for window in requests.windows),
            device=device_label(machine.device),
            dtype=str(machine.dtype).removeprefix("torch."),
        ),
        problems=tuple(problems),
    )
