"""A source that somebody writes to, replaces or removes while it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from _nano import fault_hook, nano_checkpoint

from tolkit.build import build
from tolkit.errors import CheckpointError
from tolkit.progress import SilentProgress


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read(name: str, how: str, tmp_path: Path) -> None:
    """A mapped file written in place gives new values silently; the rows would be of two models."""
    source = nano_checkpoint(tmp_path / "ckpt")

    def interfere(what: str, path: str) -> None:
        if what != "fsync" or "records-" not in path:
            return
        file = source / name
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        if how == "in place":
            with file.open("r+b") as stream:
                stream.write(data)
        else:
            file.unlink()
        if how == "replaced":
            file.write_bytes(data)

    with fault_hook(interfere), pytest.raises(CheckpointError) as caught:
        build(source, tmp_path / "b.tol", progress=SilentProgress())
    assert f"ckpt/{name}: changed while it was read" in caught.value.message
    assert not (tmp_path / "b.tol").exists()
