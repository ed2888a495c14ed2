"""Badly compressed bundles and the runs that heal them."""

from pathlib import Path
from typing import Any

from _nano import tree_bytes
from _pico import pico_checkpoint
from _training import lines_of_words

from tolkit.compress import CompressSpec, compress
from tolkit.progress import SilentProgress
from tolkit.train import TrainSpec


def coded(checkpoint: Path, **options: Any) -> Path:
    """A badly compressed bundle of a checkpoint, beside it."""
    spec = CompressSpec(rank="25%", codec="nf4", **options)
    compress(checkpoint, checkpoint.with_suffix(".tol"), spec, progress=SilentProgress())
    return checkpoint.with_suffix(".tol")


def tables(path: Path) -> dict[str, bytes]:
    return tree_bytes(path / "tables")


def heal_folder(folder: Path) -> Path:
    """A text, checkpoints of every architecture, and bundles of those that have tables."""
    (folder / "sky.txt").write_text(lines_of_words(60))
    for arch in ("memory", "flex", "dense"):
        pico_checkpoint(folder / arch, arch)
        if arch != "dense":
            coded(folder / arch)
    return folder


def heal_spec(work: Path, out: Path) -> TrainSpec:
    """Six steps around the tables of memory.tol in `work`."""
    return TrainSpec(
        out=out,
        text=(str(work / "sky.txt"),),
        init=work / "memory.tol",
        freeze_tables=True,
        steps=6,
        sequence=16,
        batch=4,
        micro_batch=2,
        learning_rate=3e-3,
        save_every=2,
        dtype="float32",
        cache_dir=work / "cache",
    )
