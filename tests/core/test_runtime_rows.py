"""Rows from disk, host and device: the same as the reader's, layer by layer, within their memory.

The oracle is `Bundle.rows` (numpy), which its own tests compare with the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _bands import write_bands
from _coded import write_coded
from _nano import ALL_CODECS, MIXED, NF4, RAW_F32, fault_hook, write_nano
from _pico import pico_checkpoint, pico_ids, pico_model

from tolkit.build import build
from tolkit.errors import BundleError, ResourceError, UsageError
from tolkit.runtime import TABLE_PLACES, TableRows, disk, host, open_table_rows, planes
from tolkit.runtime.decoded import DecodedRows
from tolkit_formats import Bundle, open_bundle
from tolkit_formats.frame_plan import least_cache_bytes

BUNDLES: dict[str, Callable[[Path], object]] = {
    "all codecs": lambda path: write_nano(path, ALL_CODECS),
    "dropped and folded": lambda path: write_nano(path, MIXED, gone={0: None, 3: 2}),
    "no table at all": lambda path: write_nano(path, MIXED, gone=dict.fromkeys(range(4))),
    "no counts": lambda path: write_nano(path, [NF4], counts=False),
    "one token": lambda path: write_nano(path, [RAW_F32, NF4], vocab_size=1, tokenizer=False),
    "three tiers, predictors": write_bands,
    "coded, two tiers": write_coded,
    "coded, a tier of means": lambda path: write_coded(path, counts=(1,)),
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    BUNDLES[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


def require_equal(bundle: Bundle, rows: TableRows | DecodedRows, ids: list[int]) -> None:
    ids_n = torch.tensor(ids, dtype=torch.int64)
    expected = bundle.rows(ids)
    fetched = rows.fetch(ids_n)
    assert len(fetched) == bundle.num_layers
    for layer in range(bundle.num_layers):
        plane_nD = fetched[layer]
        if layer not in bundle.layer_ids:
            assert plane_nD is None
            continue
        want = expected[:, bundle.layer_ids.index(layer)]
        assert plane_nD is not None and plane_nD.shape == want.shape
        scale = np.linalg.norm(want, axis=1, keepdims=True) + 1e-30
        assert (np.abs(plane_nD.numpy() - want) <= 1e-6 * scale).all()


def draws(bundle: Bundle) -> list[list[int]]:
    """Batches: none, one, all, repeats, again."""
    rng = np.random.default_rng(3)
    vocab_size = bundle.vocab_size
    return [
        [],
        [vocab_size - 1],
        list(range(vocab_size)),
        rng.integers(0, vocab_size, 30).tolist(),
        [0, 0, vocab_size - 1, 0],
    ]


@pytest.mark.parametrize("tables", TABLE_PLACES)
@pytest.mark.parametrize("large_batches", [False, True])
def test_rows_are_those_of_the_reader(
    bundle: Bundle, tables: str, large_batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large_batches:  # as if these few rows were too many to hold
        monkeypatch.setattr(disk, "_HELD_BYTES", 0)
        monkeypatch.setattr(host, "_HELD_BYTES", 0)
        monkeypatch.setattr(planes, "_AT_ONCE_BYTES", -1)
        monkeypatch.setattr(planes, "_PART_BYTES", 700)
    rows = open_table_rows(bundle, tables)
    for ids in draws(bundle):
        rows.prefetch(torch.tensor(ids, dtype=torch.int64))
        require_equal(bundle, rows, ids)
    rows.close()


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_smallest_cache_serves_any_batch(
    bundle: Bundle, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_HELD_BYTES", held)
    least = least_cache_bytes(bundle)
    rows = open_table_rows(bundle, "disk", max_table_bytes=least)
    for ids in draws(bundle):
        require_equal(bundle, rows, ids)
    assert rows.statistics.resident_bytes <= least
    with pytest.raises(UsageError, match=f"at least {least:,}"):
        open_table_rows(bundle, "disk", max_table_bytes=least - 1)


@pytest.mark.parametrize("decoded_bytes", [0, 1 << 20])
def test_rows_decoded_once_are_the_same(bundle: Bundle, decoded_bytes: int) -> None:
    rows = DecodedRows(bundle, decoded_bytes=decoded_bytes)
    for ids in draws(bundle):
        require_equal(bundle, rows, ids)
    if decoded_bytes:
        assert rows.statistics.rows_read == bundle.vocab_size
    with pytest.raises(UsageError, match="out of range"):
        rows.fetch(torch.tensor([-1]))


def test_planes_of_a_large_batch_outlive_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes are asked for after other fetches have pushed their records out."""
    monkeypatch.setattr(disk, "_HELD_BYTES", 0)
    bundle = open_bundle(write_nano(tmp_path / "b.tol", ALL_CODECS).path)
    rows = open_table_rows(bundle, "disk", max_table_bytes=least_cache_bytes(bundle) + 2000)
    early = rows.fetch(torch.arange(8))
    rows.fetch(torch.arange(8, 40))
    for layer in range(bundle.num_layers):
        plane_nD = early[layer]
        assert plane_nD is not None
        want = bundle.rows(range(8))[:, layer]
        np.testing.assert_allclose(plane_nD.numpy(), want, rtol=1e-5, atol=1e-5)
    assert rows.statistics.bytes_read > rows.statistics.rows_read * bundle.manifest.tiers[0].stride


@pytest.mark.parametrize("tables", TABLE_PLACES)
def test_logits_from_raw_tables_are_the_ffns(tmp_path: Path, tables: str) -> None:
    checkpoint = pico_checkpoint(tmp_path / "c")
    build(checkpoint, tmp_path / "b.tol", dtype="f32")
    model, ids_BT = pico_model(), pico_ids()
    rows = open_table_rows(open_bundle(tmp_path / "b.tol"), tables)
    with torch.no_grad():
        from_tables, from_ffn = model(ids_BT, rows=rows), model(ids_BT)
    torch.testing.assert_close(from_tables, from_ffn, rtol=1e-5, atol=1e-5)
    assert from_tables.argmax(-1).equal(from_ffn.argmax(-1))


@pytest.mark.parametrize("tables", TABLE_PLACES)
def test_rows_come_in_the_format_asked_for(tmp_path: Path, tables: str) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol").path)
    rows = open_table_rows(bundle, tables, dtype=torch.bfloat16)
    plane_nD = rows.fetch(torch.tensor([5]))[0]
    assert plane_nD is not None and plane_nD.dtype is torch.bfloat16
    want = torch.from_numpy(np.ascontiguousarray(bundle.rows([5])[:, 0])).bfloat16()
    assert plane_nD.equal(want)


@pytest.mark.parametrize("tables", TABLE_PLACES)
@pytest.mark.parametrize("wrong", [-1, 40])
def test_an_id_out_of_range_is_named(tmp_path: Path, tables: str, wrong: int) -> None:
    rows = open_table_rows(open_bundle(write_nano(tmp_path / "b.tol").path), tables)
    with pytest.raises(UsageError, match=f"token id {wrong}: out of range"):
        rows.fetch(torch.tensor([3, wrong]))


@pytest.mark.parametrize("tables", ["host", "device"])
def test_tables_beyond_the_ceiling_are_refused(tmp_path: Path, tables: str) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol").path)
    size_bytes = 40 * bundle.manifest.tiers[0].stride
    open_table_rows(bundle, tables, max_table_bytes=size_bytes).close()
    with pytest.raises(ResourceError, match=f"take {size_bytes:,} bytes") as caught:
        open_table_rows(bundle, tables, max_table_bytes=size_bytes - 1)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("tables", TABLE_PLACES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(tmp_path: Path, tables: str) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol").path)
    with pytest.raises(ResourceError, match="cuda"):
        open_table_rows(bundle, tables, device=torch.device("cuda"))


def test_an_unknown_place_is_refused(tmp_path: Path) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol").path)
    with pytest.raises(UsageError, match="disk, host, device"):
        open_table_rows(bundle, "ram")


@pytest.mark.parametrize("tables", TABLE_PLACES)
def test_a_damaged_record_is_refused(tmp_path: Path, tables: str) -> None:
    nano = write_nano(tmp_path / "b.tol", vocab_size=20_000, hidden_size=32, max_shard_bytes=1)
    (shard, *_) = sorted((nano.path / "tables").glob("records-*"))[1:]
    bundle = open_bundle(nano.path)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    with shard.open("r+b") as file:
        file.write(data)
    with pytest.raises(BundleError, match=shard.name):
        rows = open_table_rows(bundle, tables)
        planes_nD = rows.fetch(torch.arange(20_000))
        list(planes_nD)


def test_host_prefetch_is_used_only_for_the_same_ids(tmp_path: Path) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol").path)
    rows = open_table_rows(bundle, "host")
    rows.prefetch(torch.tensor([1, 2]))
    require_equal(bundle, rows, [2, 3])


def test_statistics_of_the_places(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    bundle = open_bundle(nano.path)
    size_bytes = 40 * bundle.manifest.tiers[0].stride
    for tables in ("host", "device"):
        rows = open_table_rows(bundle, tables)
        rows.fetch(torch.tensor([4, 7, 9]))
        seen = rows.statistics
        assert (seen.rows_asked, seen.cache_hits, seen.rows_read) == (3, 3, 40)
        assert seen.hit_rate == 1.0 and seen.bytes_read == size_bytes
        assert seen.resident_bytes >= size_bytes


def test_a_disk_error_gives_no_rows(tmp_path: Path) -> None:
    def fail(operation: str, path: str) -> None:
        if operation == "pread":
            raise OSError(5, "Input/output error")

    bundle = open_bundle(write_nano(tmp_path / "b.tol", counts=False).path)
    rows = open_table_rows(bundle, "disk")
    rows.fetch(torch.tensor([0]))
    with fault_hook(fail):
        rows.prefetch(torch.tensor([7]))
        with pytest.raises(ResourceError, match=r"input/output error.*slot 7"):
            rows.fetch(torch.tensor([7]))
    require_equal(bundle, rows, [7])
