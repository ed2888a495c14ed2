"""What a task is: items to score, read from a local file, and the metrics they give.

An item's texts are already prompts: everything a task knows of its data set ends here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tolkit.evaluate.tasks.records import Record, read_records

__all__ = ["Item", "LabelledTask", "Page", "Task", "TaskItem", "choice_item"]

_VALIDATION = ("validation.jsonl", "valid.jsonl", "dev.jsonl", "val.jsonl")


@dataclass(frozen=True)
class Item:
    """Texts to score after their contexts: the choices of a question, or one expected word.

    where: file and line, for messages.
    pairs: (context, continuation), one a choice; the continuation starts with its delimiter.
    gold: index of the right choice; None where there is one continuation, which is right when
        the model would have written it.
    lengths: characters of each choice without delimiter, what acc_norm divides by.
    """

    where: str
    pairs: tuple[tuple[str, str], ...]
    gold: int | None = None
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Page:
    """A text of which every token is predicted.

    n_words, n_bytes: what its perplexities divide by; not counted on `text`.
    """

    where: str
    text: str
    n_words: int
    n_bytes: int


TaskItem = Item | Page


class Task(Protocol):
    """One evaluation task, with the prompts and metrics of lm-evaluation-harness 0.4.13.

    version: of the definition, as the harness counts it.
    metrics: names in the order of reports (`tolkit.evaluate.tasks.measures`).
    file_names: what its data is called in a folder of its own; the first that is there counts.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def file_names(self) -> tuple[str, ...]: ...

    def items(self, path: Path, limit: int | None) -> list[TaskItem]:
        """The items of a file, the first `limit` where given; DataError for what is unfit."""
        ...


@dataclass(frozen=True)
class LabelledTask:
    """A task with one item a JSONL record.

    item: makes one of a record.
    test_split: look for test.jsonl first, as the harness does where test labels are public.
    labels_field: field that may come from a file of labels beside the records instead.
    """

    name: str
    version: str
    metrics: tuple[str, ...]
    item: Callable[[Record], Item]
    test_split: bool = False
    labels_field: str | None = None

    @property
    def file_names(self) -> tuple[str, ...]:
        return ("test.jsonl", *_VALIDATION) if self.test_split else _VALIDATION

    def items(self, path: Path, limit: int | None) -> list[TaskItem]:
        """One item a record; the errors are those of `read_records` and `Record`."""
        return [self.item(record) for record in read_records(path, limit, self.labels_field)]


def choice_item(record: Record, context: str, choices: list[str], gold: int) -> Item:
    """One context, each choice after a space."""
    return Item(
        where=record.where,
        pairs=tuple((context, " " + choice) for choice in choices),
        gold=gold,
        lengths=tuple(len(choice) for choice in choices),
    )
