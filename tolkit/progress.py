"""How long work reports itself: a protocol, a silent one, and tqdm by default.

Library functions take ``progress: Progress``. The terminal passes its own (rich).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Progress", "SilentProgress", "Task", "TqdmProgress"]


class Task(Protocol):
    """One running piece of work with a known total."""

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""

    def note(self, text: str) -> None:
        """Show a short changing remark beside the bar (a loss, a layer)."""


class Progress(Protocol):
    """Where a library function reports to."""

    def task(self, label: str, total: float, unit: str) -> Any:
        """Context manager yielding a Task that ends at `total` `unit`s."""

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the work."""


class _SilentTask:
    def advance(self, amount: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class SilentProgress:
    """Says nothing; keeps the warnings for whoever asks (`warnings`)."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Task]:
        yield _SilentTask()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class _TqdmTask:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, amount: float) -> None:
        self._bar.update(amount)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)


class TqdmProgress:
    """tqdm on stderr, silent when stderr is not a terminal."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Task]:
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit=unit, disable=None, file=sys.stderr) as bar:
            yield _TqdmTask(bar)

    def warn(self, message: str) -> None:
        sys.stderr.write(f"warning: {message}\n")
