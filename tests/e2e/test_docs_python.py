"""The Python page: its example runs, and every name in its table exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from _pico import pico_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def run(code: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pico_checkpoint(tmp_path / "ckpt")
    (tmp_path / "text.txt").write_text("A table of words, looked up one by one.\n" * 40)
    monkeypatch.chdir(tmp_path)
    figures, text, with_transformers = blocks()
    names = run(figures)
    assert "kl_mean_nats" in capsys.readouterr().out
    assert getattr(names["rows"], "shape") == (2, 2, 32)  # noqa: B009
    run(text)
    assert capsys.readouterr().out.startswith("0 length ")
    pytest.importorskip("transformers")
    run(with_transformers)
    assert capsys.readouterr().out.startswith("A table of words")


def test_every_call_named_exists() -> None:
    calls = re.findall(r"^\| `(tolkit[\w.]*)\.(\w+)\(", PAGE.read_text(), flags=re.M)
    assert len(calls) >= 10
    for module, name in calls:
        assert callable(getattr(importlib.import_module(module), name))
