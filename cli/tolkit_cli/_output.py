"""The one object through which a command speaks.

stdout carries the result and nothing else; warnings, hints, errors and progress go to stderr.
Three modes: `human` (aligned, units), `plain` (tab-separated, raw numbers; an
empty line before a table), `json` (one object
at the end). A command states each fact once, as a field or a table; the mode decides its form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from tolkit_cli._errors import Failure
    from tolkit_cli._progress import CliProgress

__all__ = ["SCHEMA", "Column", "Mode", "Output", "Section"]

SCHEMA = "tolkit.result/1"
Mode = Literal["human", "plain", "json"]
Section = Literal["inputs", "outputs", "metrics"]
_LABEL_WIDTH = 20
_WIDTH = 80
_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}


@dataclass(frozen=True)
class Column:
    """One table column: `key` in JSON and plain, `title` and `text` for people.

    human: key of the row's own text for people, where the form depends on the row.
    """

    key: str
    title: str
    text: Callable[[Any], str] = str
    right: bool = True
    human: str = ""


class Output:
    """Collects what a command found and prints it in the chosen mode.

    Args:
        mode: None means human on a terminal, plain otherwise.
        quiet: print only the value given to `quiet_value`; no progress and no hints.
    """

    def __init__(
        self,
        *,
        command: str = "",
        mode: Mode | None = None,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.stdout = stdout if stdout is not None else sys.stdout
        self.stderr = stderr if stderr is not None else sys.stderr
        self.command = command
        self.mode: Mode = "plain"
        self.quiet = False
        self.resumable = False
        self._sections: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}, "metrics": {}}
        self._thresholds: list[dict[str, Any]] = []
        self._timings_s: dict[str, float] = {}
        self._warnings: list[str] = []
        self._quiet_value: object = None
        self._started_s = time.perf_counter()
        self._stdout_closed = False
        self._muted = False
        self._wrote = False
        self.configure(command, mode, quiet)

    def configure(self, command: str, mode: Mode | None, quiet: bool) -> None:
        """Set what the command line asked for, once it is parsed."""
        self.command = command
        self.mode = mode or ("human" if self.stdout.isatty() else "plain")
        self.quiet = quiet

    def mute(self) -> None:
        """Say nothing but errors: another process of the same job reports."""
        self.quiet = True
        self._muted = True

    def progress(self) -> CliProgress:
        """A progress drawing for library calls: bars on a terminal, lines elsewhere."""
        from tolkit_cli._progress import progress_for

        return progress_for(self)

    def record(self, section: Section, **facts: Any) -> None:
        """Facts for the JSON object only."""
        self._sections[section].update(facts)

    def field(
        self, section: Section, key: str, value: Any, title: str = "", text: str | None = None
    ) -> None:
        """One fact: JSON `section.key`, plain `key<TAB>value`, human `title  text`."""
        self._sections[section][key] = value
        if self.mode == "json" or self.quiet or value is None:
            return
        if self.mode == "plain":
            self._write(f"{key}\t{_plain(value)}\n")
        else:
            label = title or key.replace("_", " ")
            self._write(f"{label:<{_LABEL_WIDTH}}  {_human(value) if text is None else text}\n")

    def table(
        self,
        key: str,
        columns: Sequence[Column],
        rows: Iterable[Mapping[str, Any]],
        *,
        in_json: bool = True,
        leading: int = 0,
    ) -> None:
        """Rows, under `metrics.key` in JSON unless told otherwise; None prints as "-".

        For people a table that is too wide goes on below, its `leading` columns repeated.
        """
        rows = [dict(row) for row in rows]
        if in_json:
            self._sections["metrics"][key] = [
                {c.key: row.get(c.key) for c in columns} for row in rows
            ]
        if self.mode == "json" or self.quiet:
            return
        if self.mode == "plain":
            self._write("\n" if self._wrote else "")
            self._write("\t".join(c.key for c in columns) + "\n")
            for row in rows:
                self._write("\t".join(_plain(row.get(c.key)) for c in columns) + "\n")
            return
        cells = [[_cell(c, row) for c in columns] for row in rows]
        widths = [
            max(len(c.title), *(len(line[i]) for line in cells), 0) for i, c in enumerate(columns)
        ]
        for number, shown in enumerate(_fitting(widths, leading)):
            self._write("\n" if number else "")
            for line in [[c.title for c in columns], *cells]:
                parts = [
                    line[i].rjust(widths[i]) if columns[i].right else line[i].ljust(widths[i])
                    for i in shown
                ]
                self._write("  ".join(parts).rstrip() + "\n")

    def text(self, line: str = "") -> None:
        """A line for people only."""
        if self.mode == "human" and not self.quiet:
            self._write(line + "\n")

    def stream(self, text: str) -> None:
        """A piece of a result that is text itself, as it comes; also under -q, not in JSON.

        On a terminal control characters are spelled out: the text may be anything.
        """
        if self.mode != "json":
            self._write(text.translate(_CONTROLS) if self.mode == "human" else text)

    def note(self, line: str) -> None:
        """What the work took, on stderr; silent under -q and where the JSON object says it."""
        if not self.quiet and self.mode != "json":
            self._error_line(line)

    @property
    def stdout_closed(self) -> bool:
        """Whether the reader of stdout has gone."""
        return self._stdout_closed

    def threshold(self, verdict: Mapping[str, Any]) -> None:
        """One gate's outcome, for `thresholds` in the JSON object."""
        self._thresholds.append(dict(verdict))

    def quiet_value(self, value: object) -> None:
        """The one value a script wants from this command under -q."""
        self._quiet_value = value

    def warn(self, message: str) -> None:
        """Something that does not stop the work but matters to the result."""
        if message not in self._warnings:
            self._warnings.append(message)
            if not self._muted:
                self._error_line(f"warning: {message}")

    def hint(self, message: str) -> None:
        """What to do next; silent under -q."""
        if message and not self.quiet:
            self._error_line(f"hint: {message}")

    @contextmanager
    def timing(self, key: str) -> Iterator[None]:
        """Adds the block's seconds to `timings_s.key`."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._timings_s[key] = round(time.perf_counter() - started_s, 3)

    def finish(self) -> None:
        """Print what waits for the end: the JSON object, or the quiet value."""
        if self.mode == "json":
            self._write(self._json(None))
        elif self.quiet and self._quiet_value is not None:
            self._write(f"{_plain(self._quiet_value)}\n")

    def fail(self, failure: Failure) -> None:
        """Report a failure: two lines on stderr, and in json mode the object on stdout."""
        self._error_line(f"error: {failure.message}")
        if failure.hint:
            self._error_line(f"hint: {failure.hint}")
        if failure.traceback:
            self._error_line(failure.traceback.rstrip("\n"))
        if self.mode == "json":
            self._write(self._json(failure))

    def _json(self, failure: Failure | None) -> str:
        dropped: list[str] = []
        facts = {
            "inputs": self._sections["inputs"],
            "outputs": self._sections["outputs"],
            "metrics": self._sections["metrics"],
            "thresholds": self._thresholds,
        }
        timings_s = {**self._timings_s, "total": round(time.perf_counter() - self._started_s, 3)}
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "command": self.command,
            "ok": failure is None,
            **{key: _jsonable(value, key, dropped) for key, value in facts.items()},
            "timings_s": timings_s,
            "versions": _versions(),
        }
        for where in dropped:
            self.warn(f"{where}: not a finite number, written as null")
        result["warnings"] = self._warnings
        if failure is not None:
            result["error"] = {
                "type": failure.type,
                "message": failure.message,
                "hint": failure.hint,
            }
        return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _error_line(self, line: str) -> None:
        try:
            self.stderr.write(line + "\n")
            self.stderr.flush()
        except OSError:  # nobody is left to tell
            pass

    def _write(self, text: str) -> None:
        if self._stdout_closed or self._muted or not text:
            return
        self._wrote = True
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            self._stdout_closed = True
            discard_stdout(self.stdout)


def discard_stdout(stream: TextIO) -> None:
    """After the reader left: point the descriptor at nothing, so the exit flush is quiet."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _fitting(widths: Sequence[int], leading: int) -> list[list[int]]:
    """Columns of each part of a table, so that none is wider than 80 where that can be."""
    parts = [list(range(leading or len(widths)))]
    for i in range(len(parts[0]), len(widths)):
        if sum(widths[k] + 2 for k in parts[-1]) + widths[i] > _WIDTH and len(parts[-1]) > leading:
            parts.append(list(range(leading)))
        parts[-1].append(i)
    return parts


def _cell(column: Column, row: Mapping[str, Any]) -> str:
    value = row.get(column.key)
    if value is None:
        return "-"
    return str(row[column.human]) if column.human else column.text(value)


def _human(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _plain(value: object) -> str:
    """A value on one tab-separated line: raw numbers, no tabs or line ends inside."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(_plain(item) for item in value)
    return str(value).replace("\t", " ").replace("\n", " ")


def _jsonable(value: Any, where: str, dropped: list[str]) -> Any:
    """Plain JSON data; numbers that are not finite become None and are named in `dropped`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v, f"{where}.{k}", dropped) for k, v in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        dropped.append(where)
        return None
    if hasattr(value, "item"):  # numpy and torch scalars
        return _jsonable(value.item(), where, dropped)
    if isinstance(value, Iterable):
        return [_jsonable(v, f"{where}[{i}]", dropped) for i, v in enumerate(value)]
    raise AssertionError(f"{where}: {type(value).__name__} cannot be written as JSON")


def _versions() -> dict[str, str]:
    """Versions that took part: ours, Python's, and of loaded libraries only."""
    from tolkit import __version__

    versions = {"tolkit": __version__, "python": sys.version.split()[0]}
    for name in ("numpy", "torch"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = str(module.__version__)
    return versions
