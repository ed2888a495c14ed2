"""Every way a command can end: exit code, the error line, the hint, the traceback rule."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from _surface import error_codes
from _tiny_bundles import write_bundle

from tolkit import errors
from tolkit_cli._errors import EXIT_CODES
from tolkit_cli.main import main

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})  # torch's, by name
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `tol inspect` meet `error` inside its library call."""

    def raises(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tolkit_formats.open_bundle", raises)


@pytest.mark.parametrize(("name", "code"), sorted(error_codes().items()))
def test_each_error_class_has_its_code(
    name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, getattr(errors, name)("a.tol: wrong", hint="tol mend"))
    assert main(["inspect", "a.tol"]) == code
    assert code in EXIT_CODES
    captured = capsys.readouterr()
    assert captured.err == "error: a.tol: wrong\nhint: tol mend\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "BUNDLE: missing"),
        (["inspect", "a", "b"], "tol: got unexpected extra argument(s) (b)"),
        (["inspect", "a", "--jsn"], "--jsn: no such option; near: --json"),
        (["inspct"], "tol: no such command 'inspct'. Did you mean 'inspect'?"),
        (["inspect", "a", "--format", "xml"], "--format: 'xml' is not one of"),
        (["diff", "a", "b", "--rows", "x"], "--rows: "),
        (["diff", "a", "b", "--rows", "-1"], "--rows: "),
    ],
)
def test_usage_mistakes_name_the_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.splitlines()[1].startswith("hint: tol ")
    assert captured.out == ""


def test_no_command_prints_the_help_as_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Usage: tol")
    assert captured.out == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError(CUDA),
        RuntimeError(CPU),
        OSError(errno.ENOSPC, "No space left on device", "out.tol"),
        PermissionError(errno.EACCES, "Permission denied", "out.tol"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_shortages_of_the_machine_are_6(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert main(["inspect", "a.tol"]) == 6
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), ValueError("bad"), RuntimeError("shape")]
)
def test_anything_else_is_our_bug_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert main(["inspect", "a.tol"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"error: internal: {type(error).__name__}: {error} (test_exit_codes.py:"
    )
    assert "--debug" in second


def test_the_traceback_comes_with_debug_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, errors.BundleError("a.tol: damaged"))
    assert main(["inspect", "a.tol"]) == 4
    assert "Traceback" not in capsys.readouterr().err
    assert main(["inspect", "a.tol", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("ask", [["--json"], ["--format", "json"], ["--format=json"]])
def test_json_failures_are_one_object_even_before_parsing_ends(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", "a", "b", "--rows", "x", *ask]) == 2
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["command"], result["error"]["type"]) == (
        False,
        "diff",
        "UsageError",
    )


def test_an_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["inspect", "a.tol"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_done_is_0_and_names_with_markup_or_odd_bytes_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "[red]\udcff.tol")
    assert main(["inspect", str(bundle)]) == 0
    assert "[red]" in capsys.readouterr().out
