"""The tasks by name, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from tolkit.errors import DataError, UsageError
from tolkit.evaluate.tasks.arc_easy import ARC_EASY
from tolkit.evaluate.tasks.base import Task, TaskItem
from tolkit.evaluate.tasks.boolq import BOOLQ
from tolkit.evaluate.tasks.hellaswag import HELLASWAG
from tolkit.evaluate.tasks.lambada import LAMBADA
from tolkit.evaluate.tasks.openbookqa import OPENBOOKQA
from tolkit.evaluate.tasks.piqa import PIQA
from tolkit.evaluate.tasks.siqa import SIQA
from tolkit.evaluate.tasks.wikitext import WIKITEXT
from tolkit.evaluate.tasks.winogrande import WINOGRANDE
from tolkit_formats.digests import json_digest

__all__ = ["TASKS", "TaskData", "find_tasks", "load_task"]

_ALL: tuple[Task, ...] = (
    LAMBADA,
    SIQA,
    ARC_EASY,
    HELLASWAG,
    WINOGRANDE,
    BOOLQ,
    PIQA,
    OPENBOOKQA,
    WIKITEXT,
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


@dataclass(frozen=True)
class TaskData:
    """The items of a task, read from `path`.

    digest: SHA-256 over prompts, choices, labels and sizes of the items in canonical JSON; equal
        for files that say the same in different forms.
    """

    name: str
    version: str
    items: tuple[TaskItem, ...]
    digest: str
    path: Path


def load_task(name: str, path: str | Path, limit: int | None = None) -> TaskData:
    """Read a task.

    Args:
        name: one of `TASKS`.
        path: its file; or a folder that holds it, itself or in a folder called `name`. Names
            looked for: validation, valid, dev or val with .jsonl, before these test.jsonl where
            test labels are public (lambada, arc_easy, openbookqa, wikitext); for wikitext also
            .txt and the release's own wiki.test.raw and the like.
        limit: only the first so many items.

    Raises:
        UsageError: unknown name, or a limit below 1.
        DataError: no file, or one that breaks the task's form; the message names file and line.
    """
    task = _task(name)
    if limit is not None and limit < 1:
        raise UsageError(f"limit: expected at least 1, got {limit}")
    file = _file_of(task, Path(path))
    items = tuple(task.items(file, limit))
    contents = [
        {key: value for key, value in asdict(item).items() if key != "where"} for item in items
    ]
    digest = json_digest({"task": name, "version": task.version, "items": contents})
    return TaskData(name, task.version, items, digest, file)


def find_tasks(
    names: Sequence[str], folder: str | Path, limit: int | None = None
) -> list[TaskData]:
    """`load_task` of each name in FOLDER/<name>/; nothing is read before all names are known."""
    if not names:
        raise UsageError("tasks: none named, expected some of " + ", ".join(TASKS))
    for name in names:
        _task(name)
    return [load_task(name, folder, limit) for name in names]


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def _file_of(task: Task, path: Path) -> Path:
    if not path.is_dir():
        return path
    # A folder of all tasks may hold files of other kinds under these names.
    own = path / task.name
    folder = own if own.is_dir() else path
    for file_name in task.file_names:
        if (folder / file_name).is_file():
            return folder / file_name
    raise DataError(
        f"{path}: no file of task {task.name} here, expected {task.name}/ with one of "
        + ", ".join(task.file_names)
    )
