"""Which rows ``--keep-rows`` keeps, and what it asks of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _pico import PICO_VOCAB, pico_checkpoint, pico_counts
from _pico_partial import EVERY, QUIET, compressed, ids_by_count

from tolkit.build import build
from tolkit.compress.keep import parse_keep_rows
from tolkit.counts import save_counts
from tolkit.errors import CheckpointError, UsageError
from tolkit.sources import CheckpointSource
from tolkit_formats import open_bundle, verify


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("m") / "ckpt", num_hidden_layers=3)


def test_the_most_frequent_are_kept(memory: Path, tmp_path: Path) -> None:
    report = compressed(memory, tmp_path / "b.tol", "25%", codec="nf4")
    manifest = open_bundle(tmp_path / "b.tol").manifest
    has = open_bundle(tmp_path / "b.tol").has_record(EVERY.numpy())
    assert sorted(np.flatnonzero(has).tolist()) == sorted(ids_by_count()[:24])
    counts = pico_counts()
    share = sum(int(counts[i]) for i in ids_by_count()[:24]) / int(counts.sum())
    assert report.partial == manifest.partial is not None
    assert manifest.partial.covered == pytest.approx(share, rel=1e-12)
    assert manifest.history[-1].options["keep_rows"] == 24
    assert report.bits_per_value == 8 * report.table_bytes / (PICO_VOCAB * 3 * 32)
    assert verify(tmp_path / "b.tol").num_records == 24
    card = (tmp_path / "b.tol" / "README.md").read_text()
    assert f"tokens with a record: 24, {100 * share:.2f} %" in card


def test_all_rows_are_a_whole_bundle(memory: Path, tmp_path: Path) -> None:
    whole = compressed(memory, tmp_path / "whole.tol", None, codec="nf4")
    for keep in ("96", "100%"):
        report = compressed(memory, tmp_path / f"{keep}.tol", keep, codec="nf4")
        assert report.identity == whole.identity and report.partial is None


def test_hot_rows_are_those_of_the_whole_bundle(memory: Path, tmp_path: Path) -> None:
    """int8 with feedback is row by row, so a row does not depend on the others."""
    compressed(memory, tmp_path / "whole.tol", None, codec="int8")
    compressed(memory, tmp_path / "b.tol", "20", codec="int8")
    hot = ids_by_count()[:20]
    whole, part = open_bundle(tmp_path / "whole.tol"), open_bundle(tmp_path / "b.tol")
    assert np.array_equal(whole.rows(hot), part.rows(hot))


def test_build_keeps_rows_too(memory: Path, tmp_path: Path) -> None:
    report = build(memory, tmp_path / "b.tol", dtype="f32", keep="25%", progress=QUIET)
    assert report.checks["rows"] == 24 and report.checks["max_abs_difference"] == 0
    built, other = open_bundle(tmp_path / "b.tol"), tmp_path / "c.tol"
    compressed(memory, other, "24", codec="f32")
    assert built.manifest.partial == open_bundle(other).manifest.partial
    assert built.manifest.history[-1].options == {"dtype": "f32", "keep_rows": 24}
    hot = ids_by_count()[:24]
    assert np.array_equal(built.rows(hot), open_bundle(other).rows(hot))


def test_one_row_and_tokens_never_seen(memory: Path, tmp_path: Path) -> None:
    compressed(memory, tmp_path / "one.tol", "1")
    one = open_bundle(tmp_path / "one.tol")
    assert np.flatnonzero(one.has_record(EVERY.numpy())).tolist() == ids_by_count()[:1]
    compressed(memory, tmp_path / "most.tol", "94")
    most = open_bundle(tmp_path / "most.tol")
    assert most.manifest.partial is not None and most.manifest.partial.covered == 1.0
    missing = np.flatnonzero(~most.has_record(EVERY.numpy()))
    assert (pico_counts()[missing] == 0).all() and len(missing) == 2


def test_counts_of_nothing_cover_nothing_known(memory: Path, tmp_path: Path) -> None:
    digest = CheckpointSource(memory).sources().tokenizer
    assert digest is not None
    save_counts(tmp_path / "zero", np.zeros(PICO_VOCAB, np.uint64), digest)
    compressed(memory, tmp_path / "b.tol", "5", weights=str(tmp_path / "zero"))
    bundle = open_bundle(tmp_path / "b.tol")
    assert bundle.manifest.partial is not None and bundle.manifest.partial.covered is None
    assert np.flatnonzero(bundle.has_record(EVERY.numpy())).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "rows"),
    [("1", 1), ("8192", 8192), ("25%", 2048), ("0.01%", 1), ("100%", 8192), (" 33.3 % ", 2727)],
)
def test_rows_asked_for(text: str, rows: int) -> None:
    assert parse_keep_rows(text, 8192) == rows


@pytest.mark.parametrize("text", ["0", "8193", "0%", "100.1%", "-1", "1.5", "half", "", "%", "٣"])
def test_what_is_no_number_of_rows(text: str) -> None:
    with pytest.raises(UsageError, match="--keep-rows"):
        parse_keep_rows(text, 8192)


def test_counts_must_be_known(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", counts=False)
    with pytest.raises(UsageError, match="not known") as caught:
        compressed(path, tmp_path / "b.tol", "10")
    assert "tol count" in caught.value.hint and "--weights" in caught.value.hint
    compressed(path, tmp_path / "whole.tol", "100%")
    assert not (tmp_path / "b.tol").exists()


def test_whole_bundles_have_no_weights_for_the_others(memory: Path, tmp_path: Path) -> None:
    compressed(memory, tmp_path / "whole.tol", None, codec="nf4")
    with pytest.raises(UsageError, match="keeps no FFN weights") as caught:
        compressed(tmp_path / "whole.tol", tmp_path / "b.tol", "10", codec="nf4")
    assert "checkpoint" in caught.value.hint
    compressed(tmp_path / "whole.tol", tmp_path / "all.tol", "96", codec="nf4")


def test_dense_models_have_no_tables(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", "dense")
    with pytest.raises(CheckpointError, match="dense"):
        compressed(path, tmp_path / "b.tol", "10")
