"""The face of the command line: changing it is a decision, made in the golden text too."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from _surface import GOLDEN, surface_text

from tolkit_cli._command import Registered, command_named
from tolkit_cli._help import _PANEL_ORDER
from tolkit_cli.main import COMMANDS, app, main

ROOT = Path(__file__).parents[2]


def test_commands_options_defaults_and_exit_codes_are_frozen() -> None:
    assert surface_text() == GOLDEN.read_text(), (
        "the command line changed: if on purpose, run `python tests/_surface.py --write`, "
        "`make docs` and write a changelog entry"
    )


def test_the_reference_page_is_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    script = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert script["page_text"]() == script["PAGE"].read_text(), "run `make docs`"


@pytest.mark.parametrize("registered", COMMANDS, ids=lambda r: r.name)
def test_help_says_what_is_read_and_written_and_what_comes_next(
    registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*registered.name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    first = (registered.run.__doc__ or "").splitlines()[0]
    assert len(first) < 70
    assert first.endswith(".")
    assert first[0].isupper()
    assert len(registered.examples) in {2, 3}
    for example in registered.examples:
        assert example.startswith(f"tol {registered.name}")
        assert f"  {example}\n" in text, "examples are printed unwrapped"
    assert "\nNext: " in text
    assert "rite" in text, "says what it writes"
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("  tol "))
    assert text.isascii()


def test_every_option_has_a_sentence_and_a_group() -> None:
    group: Any = typer.main.get_command(app)
    for registered in COMMANDS:
        for param in command_named(group, registered.name).params:
            where = f"tol {registered.name} {param.name}"
            assert len(param.help) > 10, where
            assert param.help.rstrip()[-1] in ".]", where
            assert param.rich_help_panel in _PANEL_ORDER, where
            assert getattr(param, "is_flag", False) or param.metavar, where


def test_command_names_in_the_readme_exist() -> None:
    names = {registered.name for registered in COMMANDS}
    readme = (ROOT / "README.md").read_text()
    used = {line.split()[1] for line in readme.splitlines() if line.startswith("    tol ")}
    assert used
    assert used <= names


def test_hints_in_the_library_name_options_that_exist() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", surface_text()))
    for package in ("tolkit", "formats/tolkit_formats"):
        for file in sorted((ROOT / package).rglob("*.py")):
            used = set(re.findall(r"--[a-z][a-z-]+", file.read_text()))
            assert used <= known, f"{file}: {sorted(used - known)}"
