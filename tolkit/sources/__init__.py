"""What tables are made from: a checkpoint's FFNs or an existing bundle, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tolkit.sources.bundle import BundleSource
from tolkit.sources.checkpoint import CheckpointSource
from tolkit.sources.interface import PlaneReader, RowSource, TableSource, slots_by_count
from tolkit_formats.manifest import HistoryEntry

__all__ = [
    "BundleSource",
    "CheckpointSource",
    "PlaneReader",
    "RowSource",
    "TableSource",
    "is_bundle",
    "lineage",
    "open_source",
    "slots_by_count",
]


def is_bundle(path: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (path / "tol.json").exists() or path.name.endswith(".tol")


def open_source(path: str | Path) -> TableSource:
    """The tables of a checkpoint folder (FFN path) or of a bundle.

    Raises:
        InputError and its kin: as `checkpoint_tensors` and `open_bundle`.
    """
    path = Path(path)
    return BundleSource(path) if is_bundle(path) else CheckpointSource(path)


def lineage(history: Sequence[HistoryEntry]) -> str:
    """``build -> compress nf4 -> drop-layers``, for messages."""
    return " -> ".join(step.command for step in history)
