"""What lm-evaluation-harness measured, in tolkit's form: value, standard error and n each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tolkit.evaluate.result import Metric

__all__ = ["HarnessResult", "HarnessTask", "PrefixToken", "parse_results"]

_ERROR = "_stderr,"  # keys are METRIC,FILTER and METRIC_stderr,FILTER


@dataclass(frozen=True)
class PrefixToken:
    """The token that stands before a text without a context.

    source: ``bos``, ``eos``, ``given``, or ``line feed`` where the tokenizer has none of its own.
    """

    id: int
    text: str
    source: str


@dataclass(frozen=True)
class HarnessTask:
    """One task or group.

    metrics: by the harness's name (``acc``, ``exact_match,strict-match``; no filter named for
        ``none``). A metric's `n` is the number of documents, its `se` the harness's, NaN
        where it gives none.
    config: the task's own settings as the harness read them; empty for a group.
    """

    metrics: Mapping[str, Metric]
    n: int
    version: str | None
    num_fewshot: int | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class HarnessResult:
    """What `run_lm_eval` gives.

    tasks: every task asked for, and for a group its parts too.
    kind: ``checkpoint`` or ``bundle``; device, dtype: what the model ran on and in.
    versions: package name -> version.      config: the harness's settings of the run.
    """

    tasks: Mapping[str, HarnessTask]
    prefix_token: PrefixToken
    kind: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; numbers that are not finite are null."""
        return {
            "tasks": {name: _task_json(task) for name, task in self.tasks.items()},
            "prefix_token": dict(vars(self.prefix_token)),
            "kind": self.kind,
            "device": self.device,
            "dtype": self.dtype,
            "versions": dict(self.versions),
            "config": dict(self.config),
        }


def parse_results(results: Mapping[str, Any]) -> dict[str, HarnessTask]:
    """Every row of the harness's result dictionary; what is not a number is left out."""
    tasks = {}
    for name, row in results["results"].items():
        n = _documents(name, results)
        errors = {
            key.replace(_ERROR, ","): float(value)
            for key, value in row.items()
            if _ERROR in key and _is_number(value)
        }
        metrics = {
            key.removesuffix(",none"): Metric(float(value), errors.get(key, math.nan), n)
            for key, value in row.items()
            if "," in key and _ERROR not in key and _is_number(value)
        }
        version = results.get("versions", {}).get(name)
        tasks[name] = HarnessTask(
            metrics=metrics,
            n=n,
            version=None if version in (None, "N/A", "Yaml") else str(version),
            num_fewshot=results.get("n-shot", {}).get(name),
            config=plain_json(results.get("configs", {}).get(name, {})),
        )
    return tasks


def plain_json(value: object) -> Any:
    """`value` as JSON has it; functions by their name, other objects as text."""
    return json.loads(json.dumps(value, default=_named))


def _named(value: object) -> str:
    return str(getattr(value, "__qualname__", value))


def _documents(name: str, results: Mapping[str, Any]) -> int:
    """Documents scored: a task's own, or all of a group's tasks."""
    counts: Mapping[str, Mapping[str, int]] = results.get("n-samples", {})
    if name in counts:
        return counts[name]["effective"]
    parts: Mapping[str, list[str]] = results.get("group_subtasks", {})
    return sum(_documents(part, results) for part in parts.get(name, []))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _task_json(task: HarnessTask) -> dict[str, Any]:
    return {
        "metrics": {
            name: {"value": _finite(m.value), "se": _finite(m.se), "n": m.n}
            for name, m in task.metrics.items()
        },
        "n": task.n,
        "version": task.version,
        "num_fewshot": task.num_fewshot,
        "config": dict(task.config),
    }
