"""Drawing progress on stderr: rich on a terminal, one plain line per 10 % elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tolkit_cli._units import amount_text, duration_text

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

    from tolkit_cli._output import Output

__all__ = ["CliProgress", "progress_for"]

_LINES_A_TASK = 10
_QUICK_S = 1.0


class CliProgress(Protocol):
    """What a command hands to a library call; satisfies tolkit.progress.Progress."""

    def task(self, label: str, total: float, unit: str) -> AbstractContextManager[Any]:
        """A piece of work of `total` units."""

    def warn(self, message: str) -> None:
        """A warning for the user."""


def progress_for(output: Output) -> CliProgress:
    """Bars where they can be drawn, lines where they cannot, nothing under -q."""
    if output.quiet:
        return _Quiet(output)
    drawable = output.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "")
    return _Bars(output) if drawable else _Lines(output)


class _Quiet:
    """No drawing; warnings still reach the user."""

    def __init__(self, output: Output) -> None:
        self._output = output

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        yield _NoTask()

    def warn(self, message: str) -> None:
        self._output.warn(message)


class _NoTask:
    def advance(self, amount: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines(_Quiet):
    """A log-friendly form: one line per tenth of a task; nothing for what takes under a second."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        line = _LineTask(self._output, label, total, unit)
        yield line
        line.close()


class _LineTask:
    def __init__(self, output: Output, label: str, total: float, unit: str) -> None:
        self._output = output
        self._label, self._total, self._unit = label, total, unit
        self._done = 0.0
        self._tenths = 0
        self._note = ""
        self._started_s = time.perf_counter()
        self._lock = threading.Lock()

    def advance(self, amount: float) -> None:
        with self._lock:
            self._done += amount
            tenths = int(_LINES_A_TASK * self._done / self._total) if self._total > 0 else 0
            if tenths > self._tenths and tenths < _LINES_A_TASK:
                self._tenths = tenths
                if time.perf_counter() - self._started_s > _QUICK_S:
                    self._print(f"{10 * tenths:3d} %")

    def note(self, text: str) -> None:
        self._note = text

    def close(self) -> None:
        """The last line, with the whole time."""
        elapsed_s = time.perf_counter() - self._started_s
        if elapsed_s > _QUICK_S:
            amount = amount_text(self._done, self._unit)
            self._write(f"{self._label}: done, {amount} in {duration_text(elapsed_s)}")

    def _print(self, share: str) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        rate = self._done / max(elapsed_s, 1e-9)
        left = duration_text(max(self._total - self._done, 0) / max(rate, 1e-9))
        self._write(f"{self._label}: {share}, {amount_text(rate, self._unit)}/s, {left} left")

    def _write(self, line: str) -> None:
        note = f", {self._note}" if self._note else ""
        try:
            self._output.stderr.write(f"{line}{note}\n")
            self._output.stderr.flush()
        except OSError:  # a log that went away must not stop the work
            pass


class _Bars(_Quiet):
    """One live line a running task; a finished task leaves one line of text behind."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._bars: RichBars | None = None
        self._running = 0

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Any]:
        bars = self._open()
        task_id = bars.add_task(label, total=total, unit=unit, note="")
        started_s = time.perf_counter()
        bar = _BarTask(bars, task_id)
        try:
            yield bar
        except BaseException:
            self._close(task_id)
            raise
        elapsed_s = time.perf_counter() - started_s
        self._close(task_id)
        if elapsed_s > _QUICK_S:
            note = f", {bar.last_note}" if bar.last_note else ""
            amount = f"{amount_text(bar.done, unit)} in {duration_text(elapsed_s)}"
            self._output.stderr.write(f"{label}: done, {amount}{note}\n")

    def warn(self, message: str) -> None:
        if self._bars is None:
            super().warn(message)
            return
        self._bars.stop()
        super().warn(message)
        self._bars.start()

    def _open(self) -> RichBars:
        self._running += 1
        if self._bars is None:
            self._bars = _rich_bars(self._output)
            self._bars.start()
        return self._bars

    def _close(self, task_id: TaskID) -> None:
        assert self._bars is not None
        self._bars.remove_task(task_id)
        self._running -= 1
        self._bars.stop()
        if self._running:
            self._bars.start()
        else:
            self._bars = None


class _BarTask:
    def __init__(self, bars: RichBars, task_id: TaskID) -> None:
        self._bars, self._task_id = bars, task_id
        self.done = 0.0
        self.last_note = ""

    def advance(self, amount: float) -> None:
        self.done += amount
        self._bars.advance(self._task_id, amount)

    def note(self, text: str) -> None:
        self.last_note = text
        self._bars.update(self._task_id, note=text)


def _rich_bars(output: Output) -> RichBars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        """done/total unit, rate and time left in one column that never wraps."""

        def render(self, task: RichTask) -> Text:
            unit = task.fields["unit"]
            text = f"{task.percentage:3.0f} % of {amount_text(task.total or 0, unit)}"
            if task.speed:
                text += f"  {amount_text(task.speed, unit)}/s"
            if task.time_remaining is not None:
                text += f"  {duration_text(task.time_remaining)} left"
            return Text(text, no_wrap=True, overflow="ellipsis")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        Rate(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=output.stderr, highlight=False),
        transient=True,
        refresh_per_second=8,
    )
