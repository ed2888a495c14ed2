"""Registering commands: display options and the Output object are added in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from tolkit_cli._help import DISPLAY, PlainCommand, epilog_of
from tolkit_cli._output import Mode, Output
from tolkit_formats.errors import TolError

__all__ = ["Registered", "command", "command_named"]


@dataclass(frozen=True)
class Registered:
    """A command as declared by its module: what Typer gets, and what tests and docs read.

    A name of two words is a command of a family: ``bench decode`` is run as `tol bench decode`.
    """

    name: str
    stage: str
    run: Callable[..., None]
    examples: tuple[str, ...]
    next_step: str

    def add_to(self, app: typer.Typer) -> None:
        """Make it a command of `app`, which is its family's where it has one."""
        app.command(
            self.name.rpartition(" ")[2],
            cls=PlainCommand,
            epilog=epilog_of(self.examples, self.next_step),
            rich_help_panel=self.stage,
        )(self.run)


def command_named(group: Any, name: str) -> Any:
    """The command of a Typer group, or of a family in it (``bench decode``)."""
    for word in name.split():
        group = group.commands[word]
    return group


def _option_of(parameter: inspect.Parameter) -> str:
    """The long spelling of a parameter, or its argument name: batch_tokens -> --batch-tokens."""
    info = parameter.annotation.__metadata__[0]
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    return next((name for name in names if name.startswith("--")), str(info.metavar))


def _with_option_name(message: str, options: Mapping[str, str]) -> str:
    """Library messages name a field (`batch_tokens: ...`); say the option the user typed."""
    field, colon, rest = message.partition(": ")
    return f"{options[field]}{colon}{rest}" if field in options else message


FormatOption = Annotated[
    Literal["human", "plain", "json"] | None,
    typer.Option(
        "--format",
        metavar="FORM",
        help="human, plain or json. [default: human on a terminal, else plain]",
        rich_help_panel=DISPLAY,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=DISPLAY)
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", help="Only the main value; no progress.", rich_help_panel=DISPLAY
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Tracebacks with errors.", rich_help_panel=DISPLAY)
]

_DISPLAY_OPTIONS: dict[str, tuple[Any, Any]] = {
    "format_": (FormatOption, None),
    "json_": (JsonOption, False),
    "quiet": (QuietOption, False),
    "debug": (DebugOption, False),
}


def command(
    name: str, *, stage: str, examples: Sequence[str], next_step: str, resumable: bool = False
) -> Callable[[Callable[..., None]], Registered]:
    """Declare `function(out, ...)` as `tol NAME`.

    Its first parameter receives the Output; the display options are added to the others. The
    docstring is the help: verb line, then what is read, what is written, how large and how long.

    Args:
        stage: heading under which `tol --help` lists it.
        examples: full command lines, printed in the help and run by the tests.
        next_step: what a user usually does afterwards.
        resumable: an interrupted run is continued by the same command.
    """

    def declare(function: Callable[..., None]) -> Registered:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]
        options = {p.name: _option_of(p) for p in own}

        def run(ctx: typer.Context, **values: Any) -> None:
            asked: Mode | None = values.pop("format_")
            mode: Mode | None = "json" if values.pop("json_") else asked
            quiet = values.pop("quiet")
            values.pop("debug")
            out = ctx.obj if isinstance(ctx.obj, Output) else Output()
            out.configure(name, mode, quiet)
            out.resumable = resumable
            try:
                function(out, **values)
            except TolError as error:
                error.message = _with_option_name(error.message, options)
                raise
            out.finish()

        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
            *(
                inspect.Parameter(
                    key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
                )
                for key, (annotation, default) in _DISPLAY_OPTIONS.items()
            ),
        ]
        run.__doc__ = function.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        return Registered(name, stage, run, tuple(examples), next_step)

    return declare
