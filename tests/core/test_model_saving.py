"""Saving a checkpoint: what is replaced, what a fault leaves, what is not saved at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from _nano import fault_hook, tree_bytes
from _pico import pico_checkpoint, pico_counts, pico_model, pico_tokenizer_files, same_weights

from tolkit.errors import (
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    ResourceError,
    UsageError,
)
from tolkit.model import load_checkpoint, save_checkpoint
from tolkit_formats import files


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    before = tree_bytes(path)
    with pytest.raises(OutputExistsError, match="exists already"):
        save_checkpoint(pico_model(seed=1), path)
    assert tree_bytes(path) == before
    save_checkpoint(pico_model(seed=1), path, force=True)
    assert same_weights(load_checkpoint(path), pico_model(seed=1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


def test_force_replaces_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(UsageError):
            save_checkpoint(pico_model(), tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_checkpoint(pico_model(), tmp_path / "empty", force=True)
    assert load_checkpoint(tmp_path / "empty").config == pico_model().config


@pytest.mark.parametrize("force", [False, True])
def test_a_fault_at_any_call_leaves_old_new_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """Disk full at every I/O call in turn: the name never holds a mixture, and a rerun works."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # its fault points stay, its waiting goes
    old, new = pico_model(seed=1), pico_model(seed=2)
    path = tmp_path / "m"

    class Fault:
        def __init__(self, at: int) -> None:
            self.calls, self.at = 0, at

        def __call__(self, operation: str, where: str) -> None:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(fault: Fault) -> None:
        with fault_hook(fault):
            save_checkpoint(new, path, pico_tokenizer_files(), pico_counts(), force=force)

    def reset() -> None:
        if path.exists():
            files.remove_tree(path)
        if force:
            save_checkpoint(old, path)

    reset()
    count = Fault(-1)
    save(count)
    assert count.calls > 20
    for at in range(1, count.calls + 1):
        reset()
        with pytest.raises(ResourceError, match="no space left"):
            save(Fault(at))
        if path.exists():
            found = load_checkpoint(path)
            assert same_weights(found, old) or same_weights(found, new)
        elif force:
            assert same_weights(load_checkpoint(tmp_path / "m.replaced"), old)
        if not path.exists() or same_weights(load_checkpoint(path), old):
            save(Fault(-1))
            assert same_weights(load_checkpoint(path), new)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = pico_model()
    with torch.no_grad():
        model.embedding[9, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'model.embed_tokens.weight' holds inf in row 9"):
        save_checkpoint(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_partners_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"token_counts: shape \[95\], expected \[96\]"):
        save_checkpoint(pico_model(), tmp_path / "m", token_counts=torch.zeros(95))
    with pytest.raises(UsageError, match=r"float64, expected f32, f16 or bf16"):
        save_checkpoint(pico_model(dtype=torch.float64), tmp_path / "m")
    assert not list(tmp_path.iterdir())
