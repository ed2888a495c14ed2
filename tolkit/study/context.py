"""What every point of a study shares: the model as it is, the text, where and how things run."""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tolkit.data import read_documents
from tolkit.data.limit import limited
from tolkit.errors import UsageError
from tolkit.evaluate import Windows, windows_of
from tolkit.evaluate.adjust import MemoRows
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.tasks import TaskData, find_tasks
from tolkit.model import FfnRows
from tolkit.progress import Progress
from tolkit.study.spec import StudySpec
from tolkit.study.store import WORK
from tolkit.tables import Runnable, load_runnable

__all__ = ["Context"]


class Context:
    """A study at work. Model and text are read when first asked for.

    Attributes:
        spec: what was asked for.
        progress: where to report.
        machine: device and number format of all forward passes.
    """

    def __init__(self, spec: StudySpec, progress: Progress) -> None:
        self.spec = spec
        self.progress = progress
        self.machine = Machine(spec.device, spec.dtype, spec.batch_tokens)
        self._loaded: dict[Path, Runnable] = {}

    @cached_property
    def runnable(self) -> Runnable:
        """The model as it is: what all points compare with.

        Already on the device, so that variants share its weights; in other formats than float32
        as loaded, because the noise floor needs the exact model.
        """
        runnable, where = load_runnable(self.spec.model), self.machine.device
        model = runnable.model
        if self.machine.dtype != torch.float32:
            return runnable
        if any(p.device != where or p.dtype != torch.float32 for p in model.parameters()):
            model = copy.deepcopy(model).to(device=where, dtype=torch.float32)
        return dataclasses.replace(runnable, model=model)

    @cached_property
    def shared(self) -> Runnable:
        """The same with table rows that are worked out once a batch for it and all variants.

        For passes whose tables are streamed: made resident, each variant would hold its own.
        """
        runnable, model = self.runnable, self.runnable.model
        if self.machine.dtype != torch.float32 or not model.config.has_tables:
            return runnable
        rows = FfnRows(model) if runnable.rows is None else runnable.rows
        return dataclasses.replace(runnable, rows=MemoRows(rows))

    def loaded(self, path: Path) -> Runnable:
        """Another model, read once."""
        if path not in self._loaded:
            self._loaded[path] = load_runnable(path)
        return self._loaded[path]

    @cached_property
    def windows(self) -> Windows:
        """The text to measure on.

        Raises:
            UsageError: the study needs text and there is none.
        """
        spec = self.spec
        if not spec.data:
            raise UsageError(f"data: {spec.study} measures on text", hint="add --data TEXT")
        tokenizer = self.runnable.tokenizer
        documents = read_documents(list(spec.data))
        if spec.limit_tokens is not None:
            documents = limited(documents, tokenizer, spec.limit_tokens)
        length = spec.window or self.runnable.model.config.max_position_embeddings
        return windows_of(documents, tokenizer, length, spec.packed)

    @cached_property
    def tasks(self) -> list[TaskData]:
        """The tasks to score beside; none where none are asked for.

        Raises:
            UsageError: an unknown task, or no folder with files.     DataError: damaged files.
        """
        spec = self.spec
        if not spec.tasks:
            if spec.task_data is not None or spec.task_limit is not None:
                raise UsageError("tasks: none are named", hint="add --tasks lambada,piqa")
            return []
        if spec.task_data is None:
            raise UsageError(
                "task_data: names no folder with the tasks", hint="add --task-data DIR"
            )
        return find_tasks(spec.tasks, spec.task_data, spec.task_limit)

    @property
    def work(self) -> Path:
        """A folder for what is made on the way; it goes when the study ends."""
        return self.spec.out / WORK

    def measured_on(self) -> dict[str, Any]:
        """The part of a fingerprint that says on what text and machine points are measured."""
        windows = self.windows
        return {
            "text": windows.text_digest,
            "tokenizer": windows.tokenizer_digest,
            "window": windows.length,
            "packed": windows.packed,
            "dtype": str(self.machine.dtype).removeprefix("torch."),
            "device": self.machine.device.type,
            "tasks": {task.name: [task.version, task.digest] for task in self.tasks},
        }
