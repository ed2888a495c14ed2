"""Badly compressed bundles and the runs that heal them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _nano import tree_bytes
from _pico import pico_checkpoint

from tolkit.compress import CompressSpec, compress
from tolkit.progress import SilentProgress
from tolkit.train import TrainReport, TrainSpec, train

WORDS = ["sun", "moon", "star", "sky", "the", "a", "of", "in", "rises", "falls", "blue", "night"]


def coded(checkpoint: Path, **options: object) -> Path:
    """A badly compressed bundle of a checkpoint, beside it."""
    spec = CompressSpec(rank="25%", codec="nf4", **options)  # type: ignore[arg-type]
    compress(checkpoint, checkpoint.with_suffix(".tol"), spec, progress=SilentProgress())
    return checkpoint.with_suffix(".tol")


class Interrupted(BaseException):
    pass


class Interrupting(SilentProgress):
    """Raises once `steps` steps are done, as a signal between two steps would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator["Interrupting"]:
        yield self

    def advance(self, amount: float) -> None:
        self.left -= int(amount)
        if self.left <= 0 and amount:
            raise Interrupted

    def note(self, text: str) -> None:
        pass


def quiet(spec: TrainSpec) -> TrainReport:
    return train(spec, SilentProgress())


def tables(path: Path) -> dict[str, bytes]:
    return tree_bytes(path / "tables")


def heal_folder(folder: Path) -> Path:
    """A text, checkpoints of every architecture, and bundles of those that have tables."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=8)) + ".\n" for _ in range(60)]
    (folder / "sky.txt").write_text("".join(lines))
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
