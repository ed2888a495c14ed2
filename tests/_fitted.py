"""Small checkpoints compressed to a size, for the tests of codec bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from _nano import nano_checkpoint
from _pico import pico_model, pico_tokenizer_files

from tolkit.build import build
from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, compress
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle, verify

Rows = npt.NDArray[np.float32]
LAYERS = 3
LARGE = 2048


def run(source: Path, out: Path, threads: int = 1, **options: object) -> BundleReport:
    resources = Resources(threads=threads)
    spec = CompressSpec(**options)
    return compress(source, out, spec, resources=resources, progress=SilentProgress())


def rows_of(path: Path) -> Rows:
    verify(path)
    bundle = open_bundle(path)
    return bundle.rows(np.arange(bundle.vocab_size))


def lost(got: Rows, want: Rows, weights_V: npt.NDArray[np.float64] | None = None) -> float:
    """Weighted norm of the error of the sum over layers, relative to the sum."""
    scale = np.ones(len(want)) if weights_V is None else weights_V**0.5
    error = np.linalg.norm((got.sum(axis=1) - want.sum(axis=1)) * scale[:, None])
    return float(error / np.linalg.norm(want.sum(axis=1) * scale[:, None]))


def small_checkpoint(path: Path) -> Path:
    """V 96, D 32, L 3, counts of three tiers."""
    model = pico_model("memory", num_hidden_layers=LAYERS)
    counts_V = np.random.default_rng(0).permutation(np.repeat([1000, 30, 0], 32))
    save_checkpoint(model, path, pico_tokenizer_files(), counts_V.astype(np.uint64))
    return path


def large_checkpoint(path: Path) -> Path:
    """V 2048, D 32, L 5: enough rows for several tiers and small steps of size."""
    return nano_checkpoint(path, vocab_size=LARGE, hidden_size=32, num_hidden_layers=5)


def exact_rows(checkpoint: Path) -> Rows:
    """Rows of the uncompressed tables, which are built beside the checkpoint."""
    path = checkpoint.with_name("exact.tol")
    build(checkpoint, path, dtype="f32", progress=SilentProgress())
    return rows_of(path)
