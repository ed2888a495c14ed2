"""`tol`: assembles the commands and turns every outcome into an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Annotated, TextIO

import typer

from tolkit_cli import (
    cmd_bench,
    cmd_build,
    cmd_calibrate,
    cmd_compress,
    cmd_count,
    cmd_demo,
    cmd_diff,
    cmd_drop_layers,
    cmd_eval,
    cmd_generate,
    cmd_history,
    cmd_inspect,
    cmd_measure,
    cmd_plan,
    cmd_study,
    cmd_train,
    cmd_verify,
)
from tolkit_cli._command import Registered
from tolkit_cli._errors import EXIT_CODES, Failure, failure_of, interruption
from tolkit_cli._help import PlainGroup
from tolkit_cli._output import Mode, Output, discard_stdout

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: tuple[Registered, ...] = (
    cmd_demo.demo,
    cmd_train.train,
    cmd_build.build,
    cmd_count.count,
    cmd_calibrate.calibrate,
    cmd_plan.plan,
    cmd_compress.compress,
    cmd_drop_layers.drop_layers,
    cmd_eval.evaluate,
    cmd_measure.measure,
    cmd_study.study,
    cmd_generate.generate,
    cmd_bench.decode,
    cmd_bench.lookup,
    cmd_bench.replay,
    cmd_verify.verify,
    cmd_inspect.inspect,
    cmd_history.history,
    cmd_diff.diff,
)

app = typer.Typer(
    name="tol",
    cls=PlainGroup,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    epilog="\n".join(
        ["Exit codes:", *(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())]
    ),
)


@app.callback()
def tol(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Turn a MemoryLLM's feed-forward layers into lookup tables, shrink them, and prove they
    still work.

    Every command reads its inputs, changes none of them, and writes something new. Results go to
    stdout; progress, warnings and errors to stderr.
    """


_families = {"bench": cmd_bench.family()}
for _registered in COMMANDS:
    _family, _, _rest = _registered.name.partition(" ")
    _registered.add_to(_families[_family] if _rest else app)
for _family, _commands in _families.items():
    app.add_typer(_commands, name=_family, rich_help_panel="Run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (see EXIT_CODES) and never raises.

    Args:
        argv: arguments after the program name; None reads sys.argv.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _share_cores()
    _write_any_text(sys.stdout)
    _write_any_text(sys.stderr)
    if "--version" in arguments[:1]:
        return _print_version()
    out = Output(command=_named_command(arguments), mode=_requested_mode(arguments))
    with _terminable() as terminated:
        try:
            code = _run(arguments, out)
        except KeyboardInterrupt:
            code = 130
        except SystemExit:  # Typer leaves this way when the reader of its help has gone
            return 0
        except typer.Abort:
            code = 130
        except Exception as error:
            return _fail(error, arguments, out)
    if code == 130:
        failure = interruption(bool(terminated), resumable=out.resumable)
        out.fail(failure)
        return failure.exit_code
    return code


def _run(arguments: list[str], out: Output) -> int:
    group = typer.main.get_command(app)
    result = group.main(args=arguments, prog_name="tol", standalone_mode=False, obj=out)
    return result if isinstance(result, int) else 0


def _fail(error: Exception, arguments: list[str], out: Output) -> int:
    if not arguments and isinstance(error, typer.TyperException):
        out.stderr.write(f"{error.format_message()}\n")
        return 2
    failure: Failure = failure_of(error, command=out.command, debug="--debug" in arguments)
    out.fail(failure)
    return failure.exit_code


def _print_version() -> int:
    from tolkit import __version__

    try:
        sys.stdout.write(f"tolkit {__version__}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout(sys.stdout)
    return 0


def _named_command(arguments: Sequence[str]) -> str:
    known = {registered.name for registered in COMMANDS}
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in known:
            return name
    return ""


def _requested_mode(arguments: Sequence[str]) -> Mode | None:
    """The mode asked for, read before parsing so that a usage error honours it too."""
    if "--json" in arguments or "--format=json" in arguments:
        return "json"
    return "json" if ("--format", "json") in pairwise(arguments) else None


def _share_cores() -> None:
    """Let torch's threads sleep, not spin, while they wait for each other.

    On a machine that others use too, spinning costs most of the speed (measured: two threads on
    two cores under load, 8 steps a second against 29). libgomp reads this once, when torch loads.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _write_any_text(stream: TextIO) -> None:
    """A file name the terminal's encoding lacks is escaped, not a crash."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM ends a command the way Ctrl-C does, so that it can tidy up; yields the signals."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
