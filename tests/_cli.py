"""Commands as a shell would run them, in this process."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from tolkit_cli.main import main


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `code`."""
    capsys.readouterr()
    ended = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out, captured.err


def result_of(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    """The JSON object of a command that must end with `code`."""
    value: dict[str, Any] = json.loads(run(capsys, *words, "--json", code=code)[0])
    return value
