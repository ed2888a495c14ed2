"""What only a real process shows: imports, signals, pipes, an environment without a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from _tiny_bundles import write_bundle

RUN = [sys.executable, "-c", "import sys; from tolkit_cli.main import main; sys.exit(main())"]
HEAVY = ("torch", "transformers", "matplotlib", "tokenizers")
REPORT = """
import sys
from tolkit_cli.main import main
code = main(sys.argv[1:])
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
SLOW = """
import signal, sys, time
import tolkit_formats
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def forever(*args, **options):
    print("ready", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.05)
tolkit_formats.open_bundle = forever
from tolkit_cli.main import main
sys.exit(main(["inspect", "a.tol"]))
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """The tests' import path, for a child process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["compress", "--help"],
        ["inspect", "{a}"],
        ["verify", "{a}"],
        ["diff", "{a}", "{a}"],
        ["inspect", "missing.tol"],
    ],
    ids=" ".join,
)
def test_torch_stays_unloaded(
    arguments: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    command = [argument.format(a=bundle) for argument in arguments]
    script = REPORT.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, *command], env=environment, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    assert done.returncode == (4 if "missing.tol" in arguments else 0)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_end_with_one_line(
    number: signal.Signals, code: int, word: str, environment: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.read() == f"error: {word}\n"
    assert process.wait(timeout=10) == code


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "{a}"], ["inspect", "{a}", "--json"]]
)
def test_a_closed_pipe_ends_quietly(
    arguments: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*RUN, *(argument.format(a=bundle) for argument in arguments)],
            env=environment,
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_the_same_bytes_whatever_the_environment(environment: dict[str, str]) -> None:
    variants = [
        {},
        {"FORCE_COLOR": "1"},
        {"GITHUB_ACTIONS": "true"},
        {"NO_COLOR": "1", "TERM": "dumb"},
        {"COLUMNS": "200"},
    ]
    texts = {
        subprocess.run(
            [*RUN, "diff", "--help"], env={**environment, **extra}, capture_output=True
        ).stdout
        for extra in variants
    }
    assert len(texts) == 1
    assert b"\x1b" not in texts.pop()


def test_an_ascii_terminal_is_no_reason_to_crash(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    bundle = write_bundle(tmp_path / "größe.tol")
    done = subprocess.run(
        [*RUN, "inspect", str(bundle)],
        env={**environment, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"gr\\xf6" in done.stdout
