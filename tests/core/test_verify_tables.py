"""Recorded errors computed anew from the checkpoint, and what must not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _nano import nano_checkpoint, reseal

from tolkit.build import build
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.counts import save_counts
from tolkit.errors import BundleError, MismatchError
from tolkit.progress import SilentProgress
from tolkit.sources import open_source
from tolkit.verify_tables import TablesReport, verify_tables
from tolkit_formats import open_bundle
from tolkit_formats.diff import diff

V = 1200
QUIET = SilentProgress()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_checkpoint(tmp_path_factory.mktemp("nano") / "ckpt", vocab_size=V)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Path:
    build(checkpoint, checkpoint.with_name("exact.tol"), dtype="f32", progress=QUIET)
    return checkpoint.with_name("exact.tol")


def check(path: Path, reference: Path, rows: int | None = None) -> TablesReport:
    return verify_tables(path, reference, max_rows=rows, progress=QUIET)


@pytest.mark.parametrize(
    "options",
    [{"codec": "nf4"}, {"rank": "50%"}, {"bits_per_value": 6.0}, {"codec": "int8", "drop": (1,)}],
    ids=str,
)
def test_errors_come_out_again(
    checkpoint: Path, exact: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    path = tmp_path / "c.tol"
    compress(checkpoint, path, CompressSpec(**options), progress=QUIET)
    report = check(path, checkpoint)
    recorded = open_bundle(path).manifest.encoding.errors
    assert report.num_rows == V
    assert report.num_agreeing == 2 * len(recorded) - len(options.get("drop", ()))
    for found, other in zip(
        report.layers, diff(open_bundle(exact), open_bundle(path)).layers, strict=True
    ):
        assert found.running_sum_error == pytest.approx(other.running_sum_error, rel=1e-4)
        if other.relative_error is None:
            assert found.relative_error is None
        else:
            assert found.relative_error == pytest.approx(other.relative_error, rel=1e-4)


def test_only_figures_of_this_reference_are_compared(
    checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    compress(exact, tmp_path / "c.tol", CompressSpec(codec="nf4"), progress=QUIET)
    drop_layers(tmp_path / "c.tol", tmp_path / "d.tol", DropSpec((1,), fold=False), progress=QUIET)
    assert check(tmp_path / "c.tol", exact).num_agreeing == 6
    assert check(tmp_path / "c.tol", checkpoint).num_agreeing == 0
    # Of the plain drop: two planes and the first running sum stay relative to the exact tables.
    assert check(tmp_path / "d.tol", exact).num_agreeing == 3
    assert check(tmp_path / "d.tol", tmp_path / "c.tol").num_agreeing == 3
    assert check(tmp_path / "d.tol", checkpoint).layers[1].relative_error == 1


def test_slots_of_another_order(checkpoint: Path, tmp_path: Path) -> None:
    """The bundle's records lie by other counts than the checkpoint's."""
    counts_V = np.random.default_rng(5).integers(1, 1000, V).astype(np.uint64)
    tokenizer = open_source(checkpoint).sources().tokenizer
    assert tokenizer is not None
    save_counts(tmp_path / "counts.safetensors", counts_V, tokenizer)
    spec = CompressSpec(codec="nf4", weights=str(tmp_path / "counts.safetensors"))
    compress(checkpoint, tmp_path / "c.tol", spec, progress=QUIET)
    assert check(tmp_path / "c.tol", checkpoint).num_agreeing == 6


@pytest.mark.parametrize("rows", [1, 16, 17, 100, V - 1, V, V + 1])
def test_a_sample_is_near(checkpoint: Path, tmp_path: Path, rows: int) -> None:
    compress(checkpoint, tmp_path / "c.tol", CompressSpec(codec="nf4"), progress=QUIET)
    whole, part = check(tmp_path / "c.tol", checkpoint), check(tmp_path / "c.tol", checkpoint, rows)
    assert part.num_agreeing == (6 if rows >= V else 0)
    assert rows <= part.num_rows <= rows + 15 or part.num_rows == V
    for a, b in zip(whole.layers, part.layers, strict=True):
        assert b.relative_error == pytest.approx(a.relative_error, rel=0.5 if rows < 100 else 0.1)


@pytest.mark.parametrize("name", ["relative", "running_sum"])
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_wrong_figure_is_found(
    checkpoint: Path, tmp_path: Path, name: str, factor: float
) -> None:
    compress(checkpoint, tmp_path / "c.tol", CompressSpec(codec="nf4"), progress=QUIET)

    def lie(manifest: dict[str, dict[str, list[dict[str, float]]]]) -> None:
        manifest["encoding"]["errors"][1][name] *= factor

    reseal(tmp_path / "c.tol", lie)
    with pytest.raises(BundleError, match=r"layer 1: error .*expected .* as tol.json says"):
        check(tmp_path / "c.tol", checkpoint)


def test_another_checkpoint_is_refused(checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    other = nano_checkpoint(tmp_path / "other", vocab_size=V, seed=1)
    build(other, tmp_path / "other.tol", progress=QUIET)
    for reference in (other, tmp_path / "other.tol"):
        with pytest.raises(MismatchError, match=r"is not what .* was made from: another embedding"):
            check(exact, reference)
