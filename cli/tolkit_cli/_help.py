"""Plain-text help with option groups: stable bytes at COLUMNS=80, no colour, no boxes.

Typer draws groups ("panels") only through rich, whose output follows terminal and environment.
These subclasses write the same groups as plain text, and keep example lines unwrapped. Contexts
and formatters are typed Any because their classes are private to Typer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["DISPLAY", "PlainCommand", "PlainGroup"]

DISPLAY = "Display"
_RANGE = re.compile(r"; [-\d.]*<?=?x[<>]=?[-\d.]*(?=\])|  \[[-\d.]*<?=?x[<>]=?[-\d.]*\]")
_PANEL_ORDER = ("Input", "Model", "What to do", "Output", "Resources", DISPLAY)


class PlainCommand(TyperCommand):
    """A command whose help groups options by panel and prints its examples as they are."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [*(_argument_name(p) for p in arguments), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panels.setdefault(_panel(param), []).append(_record(param, record))
        for name in sorted(panels, key=_panel_rank):
            with formatter.section(name):
                formatter.write_dl(panels[name], col_max=24)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_raw(self.epilog, formatter)


class PlainGroup(TyperGroup):
    """Commands listed under their stage of the work; families of commands after single ones."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        for name, command in sorted(found, key=lambda entry: isinstance(entry[1], TyperGroup)):
            assert isinstance(command, (TyperCommand, TyperGroup))
            stage = str(command.rich_help_panel)
            panels.setdefault(stage, []).append((name, first_line(command.help)))
        width = max(len(name) for rows in panels.values() for name, _ in rows)
        for stage, rows in panels.items():
            with formatter.section(stage):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        records = [param.get_help_record(ctx) for param in self.get_params(ctx)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record is not None])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_raw(self.epilog, formatter)


def first_line(help_text: str | None) -> str:
    """The verb line of a command's help."""
    return (help_text or "").strip().partition("\n")[0]


def epilog_of(examples: Iterable[str], next_step: str) -> str:
    """The unwrapped end of a command's help: examples, then what usually comes next."""
    lines = ["Examples:", *(f"  {example}" for example in examples)]
    return "\n".join([*lines, "", f"Next: {next_step}"])


def _write_raw(text: str | None, formatter: Any) -> None:
    if text:
        formatter.write("\n" + text + "\n")


def _record(param: Any, record: tuple[str, str]) -> tuple[str, str]:
    """Without what the usage line and the error message already say."""
    if param.param_type_name == "argument":
        return _argument_name(param), (param.help or "").strip()
    return record[0], _RANGE.sub("", record[1])


def _argument_name(param: Any) -> str:
    name = str(param.metavar or param.name.upper())
    name = f"{name}..." if param.nargs != 1 else name
    return name if param.required else f"[{name}]"


def _panel(param: Any) -> str:
    panel = getattr(param, "rich_help_panel", None)
    if isinstance(panel, str):
        return panel
    return DISPLAY if param.name == "help" else "Input"


def _panel_rank(name: str) -> int:
    return _PANEL_ORDER.index(name)
