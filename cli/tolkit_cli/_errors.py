"""From an exception to what the user sees: one line, one hint, one exit code.

0 done, gates met        1 a bug of ours         2 usage          3 a quality gate failed
4 input                  5 partners do not match 6 environment    130 / 143 interrupted
"""

from __future__ import annotations

import errno
import traceback as traceback_module
from dataclasses import dataclass
from pathlib import Path

import typer

from tolkit_formats.errors import TolError

__all__ = ["EXIT_CODES", "Failure", "failure_of", "interruption"]

EXIT_CODES = {
    0: "done, gates met",
    1: "a bug of tolkit",
    2: "usage: bad option or argument, or the output exists",
    3: "a quality gate failed or is undecided",
    4: "input missing, corrupt, unsafe or of an unsupported version",
    5: "partners do not match (checkpoint, tokenizer, bundle, data)",
    6: "environment: device, missing extra, memory, disk, lock",
    130: "interrupted",
    143: "terminated",
}

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENOMEM}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Failure:
    """What went wrong, ready to print."""

    exit_code: int
    type: str
    message: str
    hint: str = ""
    traceback: str = ""


def failure_of(error: BaseException, *, command: str, debug: bool) -> Failure:
    """The report for any exception a command may end with.

    Only TolError, usage errors and shortages of the machine are the user's business; all else is
    a bug and says so, with the place. The traceback is added under --debug alone.
    """
    trace = "".join(traceback_module.format_exception(error)) if debug else ""
    help_command = f"tol {command} --help" if command else "tol --help"
    if isinstance(error, TolError):
        name = type(error).__name__
        return Failure(error.exit_code, name, error.message, error.hint, trace)
    if isinstance(error, typer.TyperException):
        return Failure(2, "UsageError", _usage_message(error), help_command, trace)
    if _is_out_of_memory(error):
        hint = "lower --batch-tokens or --threads, or use a machine with more memory"
        return Failure(6, "ResourceError", f"memory: {_one_line(error)}", hint, trace)
    if isinstance(error, OSError) and (error.errno in _DISK or isinstance(error, PermissionError)):
        where = error.filename if error.filename is not None else "file system"
        reason = error.strerror or _one_line(error)
        hint = "make room, or choose another place with -o"
        return Failure(6, "ResourceError", f"{where}: {reason}", hint, trace)
    where = _place(error)
    message = f"internal: {type(error).__name__}: {_one_line(error)}{where}"
    hint = "this is a bug in tolkit: run again with --debug and report the traceback"
    return Failure(1, type(error).__name__, message, "" if debug else hint, trace)


def interruption(terminated: bool, *, resumable: bool) -> Failure:
    """The report after Ctrl-C or SIGTERM."""
    hint = "the same command continues where it stopped" if resumable else ""
    if terminated:
        return Failure(143, "Terminated", "terminated", hint)
    return Failure(130, "Interrupted", "interrupted", hint)


def _usage_message(error: typer.TyperException) -> str:
    """`--option: what is wrong`, from the parser's own exceptions (read by attribute)."""
    param = getattr(error, "param", None)
    if param is not None:
        name = param.opts[0] if param.param_type_name == "option" else param.display_name_raw
        return f"{name}: {_sentence(error.message) or 'missing'}"
    option = getattr(error, "option_name", None)
    if option is not None:
        near = getattr(error, "possibilities", None)
        if hasattr(error, "possibilities"):
            return f"{option}: no such option" + (f"; near: {', '.join(near)}" if near else "")
        return f"{option}: {_sentence(str(error))}"
    return f"tol: {_sentence(error.format_message())}"


def _sentence(text: str) -> str:
    """The parser's sentence in our form: no capital, no full stop, no pydantic prefix."""
    text = " ".join(text.removeprefix("value error, ").removeprefix("Value error, ").split())
    text = text.rstrip(".")
    return text[:1].lower() + text[1:]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error).lower() for phrase in _OUT_OF_MEMORY
    )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _place(error: BaseException) -> str:
    frames = traceback_module.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
