"""The command line as data: every command, argument, option, default and exit code.

`python tests/_surface.py --write` renews the golden text after a change on purpose.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tolkit import errors
from tolkit_cli._command import command_named
from tolkit_cli._errors import EXIT_CODES
from tolkit_cli.main import COMMANDS, app

GOLDEN = Path(__file__).parent / "cli" / "surface.txt"


def surface_text() -> str:
    """The golden file's content."""
    group: Any = typer.main.get_command(app)
    lines = ["exit codes"]
    lines += [f"  {code} {meaning}" for code, meaning in EXIT_CODES.items()]
    lines += ["errors"]
    lines += [f"  {name} {code}" for name, code in sorted(error_codes().items())]
    for registered in COMMANDS:
        lines += [f"tol {registered.name}", *_parameters(command_named(group, registered.name))]
    return "\n".join(lines) + "\n"


def error_codes() -> dict[str, int]:
    """Exit code of every error class a user can meet."""
    found = {}
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.TolError):
            found[name] = value.exit_code
    return found


def _parameters(command: Any) -> Iterator[str]:
    for param in command.params:
        names = ", ".join([*param.opts, *param.secondary_opts])
        if param.param_type_name == "argument":
            names = param.metavar
        kind = "flag" if getattr(param, "is_flag", False) else _kind(param)
        default = "required" if param.required else f"default {_default(param)}"
        yield f"  {names} ({kind}) {default}"


def _kind(param: Any) -> str:
    """The values a parameter takes, as the parser sees them."""
    kind = str(param.type_descriptor.annotation)
    for noise in ("<class '", "'>", "pathlib.", "typing."):
        kind = kind.replace(noise, "")
    return kind


def _default(param: Any) -> str:
    return "none" if param.default is None else str(param.default)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(surface_text())
    else:
        sys.stdout.write(surface_text())
