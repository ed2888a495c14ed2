"""Partial bundles that compress makes of pico checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from _pico import PICO_VOCAB, pico_counts

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, compress
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable

QUIET = SilentProgress()
EVERY = torch.arange(PICO_VOCAB)


def compressed(source: Path, out: Path, keep_rows: str | None, **options: object) -> BundleReport:
    spec = CompressSpec(keep_rows=keep_rows, **options)  # type: ignore[arg-type]
    return compress(source, out, spec, resources=Resources(1), progress=QUIET)


def ids_by_count() -> list[int]:
    """Token ids by falling count, equal ones by id."""
    counts = pico_counts()
    return sorted(range(PICO_VOCAB), key=lambda i: (-int(counts[i]), i))


def planes_of(path: Path, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
    rows = load_runnable(path).rows
    assert rows is not None
    return list(rows.fetch(ids_n))
