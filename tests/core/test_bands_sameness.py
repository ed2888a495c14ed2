"""Codec bands: runs that have to give the same bundle, however they went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from _fitted import Rows, exact_rows, large_checkpoint, lost, rows_of, run
from _nano import tree_bytes

from tolkit.compress.fill import bands as fit_bands


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint(tmp_path_factory.mktemp("nano") / "ckpt")


@pytest.fixture(scope="module")
def large_rows(large: Path) -> Rows:
    return exact_rows(large)


def test_two_runs_and_two_threads_give_the_same_files(large: Path, tmp_path: Path) -> None:
    for name, threads in (("first", 1), ("second", 1), ("threads", 2)):
        run(large, tmp_path / f"{name}.tol", threads, bits_per_value=2.5)
    first = tree_bytes(tmp_path / "first.tol")
    assert tree_bytes(tmp_path / "second.tol") == first
    assert tree_bytes(tmp_path / "threads.tol") == first


class Stopped(BaseException):
    """As if the process had ended."""


def stop_after(shards: int) -> Callable[..., object]:
    from tolkit_formats.writer import ShardWriter

    whole, left = ShardWriter.__exit__, [shards]

    def leave(self, kind, value, tb):  # type: ignore[no-untyped-def]
        whole(self, kind, value, tb)
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return leave


def test_a_run_goes_on_from_finished_shards(large: Path, tmp_path: Path) -> None:
    run(large, tmp_path / "whole.tol", bits_per_value=2.5)
    with mock.patch("tolkit_formats.writer.ShardWriter.__exit__", stop_after(2)):
        with pytest.raises(Stopped):
            run(large, tmp_path / "b.tol", bits_per_value=2.5)
    assert not (tmp_path / "b.tol").exists()
    report = run(large, tmp_path / "b.tol", bits_per_value=2.5)
    assert report.resumed
    assert tree_bytes(tmp_path / "b.tol") == tree_bytes(tmp_path / "whole.tol")


def test_shards_of_another_fit_are_not_taken_over(large: Path, tmp_path: Path) -> None:
    """Another machine may fit otherwise; records of one fit must not meet bases of another."""
    from tolkit.compress.fill.lloyd import gaussian_codebook

    with mock.patch("tolkit_formats.writer.ShardWriter.__exit__", stop_after(2)):
        with pytest.raises(Stopped):
            run(large, tmp_path / "b.tol", bits_per_value=2.5)
    fitted = "tolkit.compress.fill.walk_bands.lloyd_max"
    other = mock.patch(fitted, lambda _, bits: gaussian_codebook(bits))
    with other:
        run(large, tmp_path / "whole.tol", bits_per_value=2.5)
        run(large, tmp_path / "b.tol", bits_per_value=2.5)
    assert tree_bytes(tmp_path / "b.tol") == tree_bytes(tmp_path / "whole.tol")


def test_spilled_walks_are_as_good_as_those_in_memory(
    large: Path, large_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(large, tmp_path / "memory.tol", bits_per_value=2.5)
    monkeypatch.setattr(fit_bands, "_SAMPLED_ROWS", 500)
    run(large, tmp_path / "spilled.tol", bits_per_value=2.5)
    memory, spilled = (
        lost(rows_of(tmp_path / f"{name}.tol"), large_rows) for name in ("memory", "spilled")
    )
    assert spilled == pytest.approx(memory, rel=0.05)
    assert not list(tmp_path.glob("*.partial"))
