"""Files that belong to somebody else stay, whatever names the commands use for their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from _pico import pico_model, pico_tokenizer_files

from tolkit.errors import TolError
from tolkit.model import load_checkpoint, save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.train import TrainSpec, train

THESIS = "years of work"


def save(path: Path) -> None:
    save_checkpoint(pico_model(), path, pico_tokenizer_files(), None)


def train_tiny(path: Path) -> None:
    text = path.with_name("text.txt")
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    spec = TrainSpec(out=path, text=(str(text),), layers=1, hidden_size=32, vocab_size=280, steps=1)
    train(spec, SilentProgress())


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
@pytest.mark.parametrize("command", [save, train_tiny])
def test_a_strangers_partial_folder(
    command: Callable[[Path], None], kind: str, tmp_path: Path
) -> None:
    work, elsewhere = tmp_path / "out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text(THESIS)
    if kind == "folder":
        elsewhere.rename(work)
    elif kind == "link":
        work.symlink_to(elsewhere)
    else:
        work.write_text(THESIS)
    with pytest.raises(TolError) as caught:
        command(tmp_path / "out")
    assert str(work) in caught.value.message
    kept = work if kind == "file" else work / "thesis.tex"
    assert kept.read_text() == THESIS and not (tmp_path / "out").exists()


def test_an_unfinished_training_run_is_not_saved_over(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    for name in ("lock", "plan.json", "state-000000100.safetensors"):
        (work / name).write_text(name)
    with pytest.raises(TolError, match=r"out\.partial"):
        save(tmp_path / "out")
    assert sorted(entry.name for entry in work.iterdir()) == [
        "lock", "plan.json", "state-000000100.safetensors"
    ]  # fmt: skip


def test_what_an_interrupted_save_left_is_replaced(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    for name in ("tokenizer.json", ".model.safetensors.tmp", "model-00001-of-00002.safetensors"):
        (work / name).write_text("half")
    save(tmp_path / "out")
    load_checkpoint(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
