"""What a study is, and the kind most are: variants of a model evaluated beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from tolkit.evaluate import EvalResult, evaluate
from tolkit.study.context import Context
from tolkit.study.fields import Field
from tolkit.study.paper import Paper
from tolkit.study.store import Point
from tolkit.study.task_scores import task_points
from tolkit.tables import Runnable

__all__ = ["TAKES", "EvaluatedStudy", "Opened", "Study", "Variant", "point_of"]


TAKES = frozenset({"values", "tasks", "task_data", "task_limit"})
"""Fields of StudySpec that every evaluated study has a use for."""


class Study(Protocol):
    """One study: one file and one line in the registry.

    name: how the command calls it.       title: heading of table and figure.
    about: a sentence on what is varied.  fields: its columns.     paper: what the paper shows.
    takes: fields of StudySpec that not every study has and this one does.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def fields(self) -> tuple[Field, ...]: ...
    @property
    def paper(self) -> Paper: ...
    @property
    def takes(self) -> frozenset[str]: ...

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """What its numbers depend on, the points themselves apart; flat JSON values."""

    def keys(self, context: Context) -> list[str]:
        """Names of all points, in the order of the table. UsageError for impossible values."""

    def measure(self, context: Context, keys: Sequence[str]) -> Iterator[Sequence[Point]]:
        """These points, some at a time as they are finished."""

    def appendix(self, rows: Sequence[Point]) -> Mapping[str, str]:
        """What does not fit into the table: name -> CSV, for files STUDY-NAME.csv."""

    def notes(self, context: Context, rows: Sequence[Point]) -> Sequence[str]:
        """Sentences on what the table cannot show, such as what was left out."""

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Fill a matplotlib figure (see `tolkit.study.figure`)."""


@dataclass(frozen=True)
class Opened:
    """A variant ready to run, and what is known of it only now (its bytes)."""

    runnable: Runnable
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One point to evaluate.

    key: its name.      facts: what is varied, as columns of the table.
    open: makes it; what must be tidied up afterwards goes onto the stack.
    """

    key: str
    facts: Mapping[str, Any]
    open: Callable[[ExitStack], Opened]


class EvaluatedStudy:
    """A study whose points are variants of the model, evaluated beside it on text.

    at_once: variants that share a pass over the text with the reference; all of them are in
        memory then.
    shares_rows: variants are of `Context.shared`, so their rows are worked out once a batch.
    """

    name: str
    takes: frozenset[str] = TAKES
    at_once: int = 6
    shares_rows: bool = False

    def variants(self, context: Context) -> list[Variant]:
        """All points of the study, in the order of the table."""
        raise NotImplementedError

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """See Study."""
        return {
            "study": self.name,
            "model": context.runnable.identity,
            **context.measured_on(),
        }

    def keys(self, context: Context) -> list[str]:
        """See Study."""
        return [variant.key for variant in self.variants(context)]

    def measure(self, context: Context, keys: Sequence[str]) -> Iterator[Sequence[Point]]:
        """See Study."""
        waiting = [variant for variant in self.variants(context) if variant.key in keys]
        yield from self.evaluated(context, waiting)

    def evaluated(self, context: Context, waiting: Sequence[Variant]) -> Iterator[Sequence[Point]]:
        """These variants, `at_once` at a time."""
        for start in range(0, len(waiting), self.at_once):
            yield _evaluated(context, waiting[start : start + self.at_once], self.shares_rows)

    def appendix(self, rows: Sequence[Point]) -> Mapping[str, str]:
        """Nothing more."""
        return {}

    def notes(self, context: Context, rows: Sequence[Point]) -> Sequence[str]:
        """Nothing more."""
        return ()


def _evaluated(context: Context, variants: Sequence[Variant], shares_rows: bool) -> list[Point]:
    """The points of some variants, from one pass over the text."""
    spec = context.spec
    reference, tables = context.runnable, "auto"
    if shares_rows:
        reference, tables = context.shared, "streamed"
    labels = [variant.key for variant in variants]
    with ExitStack() as stack:
        opened = [variant.open(stack) for variant in variants]
        results = evaluate(
            [one.runnable for one in opened],
            reference,
            context.windows,
            dtype=spec.dtype,
            device=spec.device,
            batch_tokens=spec.batch_tokens,
            tables=tables,
            progress=context.progress,
            labels=labels,
        )
        scores = task_points(context, reference, [one.runnable for one in opened], labels, tables)
    for result in results:
        for problem in result.problems:
            context.progress.warn(problem)
    return [
        {"key": variant.key, **variant.facts, **one.facts, **point_of(result), **on_tasks}
        for variant, one, result, on_tasks in zip(variants, opened, results, scores, strict=True)
    ]


def point_of(result: EvalResult) -> dict[str, Any]:
    """The numbers of a point: quality with standard errors, the reference's perplexity, n."""
    found: dict[str, Any] = {}
    for name in ("ppl_token", "ppl_increase", "kl_mean_nats", "top1_agreement"):
        found[name] = result.metrics[name].value
        found[f"{name}_se"] = result.metrics[name].se
    reference = result.reference_metrics["ppl_token"]
    found["reference_ppl"], found["reference_ppl_se"] = reference.value, reference.se
    found["tokens"] = result.conditions.n_tokens
    found["windows"] = result.conditions.n_windows
    return found
