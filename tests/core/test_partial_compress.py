"""Compressing to a partial bundle: every codec, tiers, plans, an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from _pico import pico_checkpoint
from _pico_partial import EVERY, QUIET, compressed, planes_of

from tolkit.compress import CompressSpec, compress
from tolkit.compress.outlook import outlook
from tolkit.compress.spec import BandsWish
from tolkit.counts import save_counts
from tolkit.model import FfnRows
from tolkit.sources import CheckpointSource
from tolkit.tables import load_runnable
from tolkit.verify_tables import verify_tables
from tolkit_formats import open_bundle, verify
from tolkit_formats.records import lay_out
from tolkit_formats.writer import ShardWriter


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("m") / "ckpt", num_hidden_layers=3)


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "f16"},
        {"codec": "nf4"},
        {"codec": "nf4", "feedback": False},
        {"rank": "50%", "codec": "int8"},
        {"rank": "4", "weights": "none"},
        {"codec": "int8", "drop": (1,)},
        {"codec": "nf4", "drop": (2,), "fold": False},
        {"bits_per_value": 6.0, "bands": BandsWish(predictor_bits=3)},
        {"bits_per_value": 6.0, "bands": BandsWish("hadamard")},
        {"bits_per_value": 6.0, "coding": "entropy"},
    ],
    ids=str,
)
def test_every_encoding(memory: Path, tmp_path: Path, options: dict[str, object]) -> None:
    report = compressed(memory, tmp_path / "b.tol", "50%", **options)
    bundle = open_bundle(tmp_path / "b.tol")
    assert bundle.manifest.num_rows == 48 and verify(tmp_path / "b.tol").num_records == 48
    if "bits_per_value" in options:
        assert report.bits_per_value <= 6.0
    model = load_runnable(memory).model
    with torch.no_grad():
        tables = list(FfnRows(model).fetch(EVERY))
    got = planes_of(tmp_path / "b.tol", EVERY)
    has = torch.from_numpy(bundle.has_record(EVERY.numpy()))
    for layer, status in enumerate(bundle.manifest.layers):
        plane = got[layer]
        if status.status != "kept":
            assert plane is None
            continue
        want = tables[layer]
        assert want is not None and plane is not None
        if (layer, options.get("drop"), options.get("fold", True)) == (2, (1,), True):
            want = tables[1] + want
        assert torch.allclose(plane[~has], want[~has], rtol=1e-5, atol=1e-5)
        assert not torch.equal(plane[has], want[has])
    found = verify_tables(tmp_path / "b.tol", memory, progress=QUIET)
    assert found.num_rows == 48 and found.num_agreeing > 0


def test_tiers_are_those_of_the_kept_tokens(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", counts=False)
    digest = CheckpointSource(path).sources().tokenizer
    assert digest is not None
    counts = np.random.default_rng(0).permutation(np.repeat([1000, 1], [40, 56])).astype(np.uint64)
    save_counts(tmp_path / "counts", counts, digest)
    options = {"bits_per_value": 6.0, "weights": str(tmp_path / "counts")}
    compressed(path, tmp_path / "b.tol", "80", **options)
    tiers = open_bundle(tmp_path / "b.tol").manifest.tiers
    assert [tier.num_rows for tier in tiers] == [40, 40]


def test_plans_foretell_the_bytes(memory: Path, tmp_path: Path) -> None:
    for options in ({"codec": "nf4"}, {"rank": "50%"}):
        spec = CompressSpec(keep_rows="30", **options)  # type: ignore[arg-type]
        dry = compress(memory, tmp_path / "no.tol", spec, dry=True, progress=QUIET)
        wet = compressed(memory, tmp_path / f"{len(options)}{spec.codec}.tol", "30", **options)
        assert dry.table_bytes == wet.table_bytes and dry.partial == wet.partial
        assert dry.nominal_bits_per_value == pytest.approx(wet.nominal_bits_per_value)
    assert wet.nominal_bits_per_value == pytest.approx(16 * 0.5 * 30 / 96)
    plan = outlook(memory, CompressSpec(bits_per_value=6.0, keep_rows="30"), progress=QUIET)
    assert plan.exact and plan.fitted_rows == 30
    wet = compressed(memory, tmp_path / "bands.tol", "30", bits_per_value=6.0)
    assert plan.table_bytes == wet.table_bytes


@pytest.fixture
def small_shards() -> Iterator[None]:
    with mock.patch("tolkit.compress.plan.lay_out", partial(lay_out, max_shard_bytes=1)):
        yield


@pytest.mark.parametrize("options", [{"codec": "nf4"}, {"rank": "50%"}], ids=str)
def test_an_interrupted_run_goes_on(
    tmp_path: Path, small_shards: None, options: dict[str, object]
) -> None:
    vocab_size = 4000
    path = pico_checkpoint(tmp_path / "ckpt", counts=False, vocab_size=vocab_size)
    digest = CheckpointSource(path).sources().tokenizer
    assert digest is not None
    counts = np.random.default_rng(1).permutation(vocab_size).astype(np.uint64)
    save_counts(tmp_path / "counts", counts, digest)
    options = {**options, "weights": str(tmp_path / "counts")}
    want = compressed(path, tmp_path / "want.tol", "2500", **options)
    written = 0
    write = ShardWriter.write

    def stop_in_the_third(self: ShardWriter, records: np.ndarray) -> None:
        nonlocal written
        written += len(records)
        if written > 2100:
            raise KeyboardInterrupt
        write(self, records)

    with mock.patch.object(ShardWriter, "write", stop_in_the_third):
        with pytest.raises(KeyboardInterrupt):
            compressed(path, tmp_path / "b.tol", "2500", **options)
    report = compressed(path, tmp_path / "b.tol", "2500", **options)
    assert report.resumed and report.identity == want.identity
    other = compressed(path, tmp_path / "c.tol", "2400", **options)
    assert other.identity != want.identity and not other.resumed
