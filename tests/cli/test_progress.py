"""Progress: bars only where they can be drawn, one line per 10 % elsewhere, nothing under -q."""

from __future__ import annotations

import io
import itertools

import pytest
from _cli import Terminal

from tolkit_cli import _progress
from tolkit_cli._output import Output


def drawn(
    monkeypatch: pytest.MonkeyPatch, *, stderr: io.StringIO, quiet: bool = False, seconds: float
) -> str:
    """What 1,000 steps draw when each reading of the clock finds `seconds` gone by."""
    clock = itertools.count()
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: seconds * next(clock))
    out = Output(mode="plain", quiet=quiet, stdout=io.StringIO(), stderr=stderr)
    progress = out.progress()
    with progress.task("build", 1000, "rows") as task:
        task.note("layer 3")
        for _ in range(1000):
            task.advance(1)
    assert isinstance(out.stdout, io.StringIO)
    assert out.stdout.getvalue() == ""
    return stderr.getvalue()


def test_a_log_gets_one_line_per_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, stderr=io.StringIO(), seconds=2).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [str(10 * n) for n in range(1, 10)]
    assert lines[0].startswith("build:  10 %, ")
    assert "rows/s" in lines[0]
    assert "left" in lines[0]
    assert lines[-1].startswith("build: done, 1,000 rows in ")
    assert lines[-1].endswith(", layer 3")


def test_quick_work_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, stderr=io.StringIO(), seconds=1e-6) == ""


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()])
def test_quiet_draws_nothing(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> None:
    assert drawn(monkeypatch, stderr=stderr, quiet=True, seconds=2) == ""


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in drawn(monkeypatch, stderr=Terminal(), seconds=2)


def test_a_terminal_gets_a_bar_that_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stderr = Terminal()
    out = Output(mode="plain", stdout=io.StringIO(), stderr=stderr)
    with out.progress().task("build", 10, "rows") as task:
        task.advance(10)
    text = stderr.getvalue()
    assert "build" in text
    assert "% of 10 rows" in text
    assert text.rstrip("\r").endswith("\x1b[?25h"), "the cursor is shown again"
    assert "\x1b[3" not in text, "NO_COLOR is honoured"


def test_warnings_reach_the_user_once_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stderr, quiet in ((io.StringIO(), False), (io.StringIO(), True), (Terminal(), False)):
        out = Output(mode="plain", quiet=quiet, stdout=io.StringIO(), stderr=stderr)
        progress = out.progress()
        with progress.task("build", 1, "rows"):
            progress.warn("odd")
            progress.warn("odd")
        assert stderr.getvalue().count("warning: odd") == 1
