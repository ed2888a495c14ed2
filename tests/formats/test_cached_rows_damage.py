"""The row cache on damaged and changed files and failing disks: an error that names the place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from _coded import write_coded
from _nano import NF4, edit_record, fault_hook, write_nano
from _row_cache import BUNDLES, Watch, plain

from tolkit_formats import Bundle, open_bundle
from tolkit_formats.cached_rows import CachedRows
from tolkit_formats.errors import BundleError, ResourceError
from tolkit_formats.frame_plan import least_cache_bytes


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    BUNDLES[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", [NF4], counts=False, vocab_size=5000, hidden_size=2048)
    bundle = open_bundle(nano.path)
    (shard,) = (nano.path / "tables").glob("records-*")
    with CachedRows(bundle) as cached:
        cached.rows([2500])
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"\x55" * 8)
    with CachedRows(open_bundle(nano.path)) as cached:
        cached.rows([0, 4999])
        with pytest.raises(BundleError, match=rf"{shard.name}: record in slot 2\d\d\d does not"):
            cached.rows(range(5000))
    with CachedRows(open_bundle(nano.path, check_crc=False)) as cached:
        assert cached.rows([2500]).shape == (1, 1, 2048)


def test_a_damaged_coded_record_is_named(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    shard = path / "tables" / "records-1-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with CachedRows(open_bundle(path)) as cached:
        with pytest.raises(BundleError, match=rf"{shard.name}"):
            cached.rows([16])


def test_a_record_of_another_bundle_is_refused(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    other = write_nano(tmp_path / "other.tol", seed=1)
    bundle = open_bundle(nano.path)
    name = "tables/records-0-00001-of-00001.safetensors"
    os.replace(other.path / name, nano.path / name)
    with pytest.raises(BundleError, match="another bundle"):
        CachedRows(bundle).rows([0])


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    other = write_nano(tmp_path / "other.tol", vocab_size=39)
    bundle = open_bundle(nano.path)
    name = "tables/records-0-00001-of-00001.safetensors"
    os.replace(other.path / name, nano.path / name)
    with pytest.raises(BundleError, match="not the shard the bundle was opened with"):
        CachedRows(bundle)


def test_a_bundle_replaced_while_open_changes_nothing(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    bundle = open_bundle(nano.path)
    with CachedRows(bundle, cache_bytes=least_cache_bytes(bundle)) as cached:
        cached.rows([0])
        shutil.rmtree(nano.path)
        write_nano(tmp_path / "b.tol", seed=1)
        np.testing.assert_allclose(cached.rows(range(40)), nano.rows_VKD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["cut", "emptied", "written to", "grown"])
def test_a_file_changed_while_open_is_named(tmp_path: Path, how: str) -> None:
    nano = write_nano(tmp_path / "b.tol", counts=False)
    (shard,) = (nano.path / "tables").glob("records-*")
    with CachedRows(open_bundle(nano.path), cache_bytes=2000) as cached:
        cached.rows([0])
        if how == "written to":  # with a record that is right in itself
            edit_record(nano.path, 30, lambda record: record.__setitem__(0, record[0] ^ 1))
            os.utime(shard, ns=(1, 1))
        else:
            size_bytes = {"cut": shard.stat().st_size - 300, "emptied": 0, "grown": 1 << 20}[how]
            os.truncate(shard, size_bytes)
        with pytest.raises(BundleError, match="while the bundle was open") as caught:
            cached.rows([39])
        assert shard.name in caught.value.message
        cached.rows([0])  # what is in memory was right when it was read


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4, 5])
def test_a_disk_error_gives_no_rows(bundle: Bundle, fail_at: int) -> None:
    ids = list(range(0, bundle.vocab_size, 2))
    with CachedRows(bundle, seed=False) as cached:
        watch = Watch(fail_at)
        with fault_hook(watch):
            try:
                cached.rows(ids)
            except ResourceError as error:
                assert watch.reads[-1] in error.message and error.exit_code == 6
                assert "slot" in error.message
            else:
                assert len(watch.reads) <= fail_at
        np.testing.assert_array_equal(cached.rows(ids), bundle.rows(ids))


def test_a_disk_error_names_the_slot(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol")
    with CachedRows(bundle) as cached:
        cached.rows([0])
        with fault_hook(Watch(1)):
            with pytest.raises(ResourceError, match=r"records-0.*error.*slot 9"):
                cached.rows([4, 9])
        np.testing.assert_array_equal(cached.rows([4, 9]), bundle.rows([4, 9]))


def test_a_failed_prefetch_is_left_to_who_asks(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol")
    with CachedRows(bundle) as cached:
        cached.rows([0])
        with fault_hook(Watch(0)):
            cached.prefetch([20, 30])
            np.testing.assert_array_equal(cached.rows([20]), bundle.rows([20]))
        assert cached.statistics.prefetched_rows == 0


def test_closing_twice_and_errors_at_opening_leave_no_descriptor(tmp_path: Path) -> None:
    bundle, seeded = plain(tmp_path / "b.tol"), plain(tmp_path / "c.tol", counts=True)
    before = len(os.listdir("/proc/self/fd"))
    cached = CachedRows(bundle)
    cached.prefetch([1])
    cached.close()
    cached.close()
    with fault_hook(Watch(0)), pytest.raises(ResourceError):
        CachedRows(seeded)
    assert len(os.listdir("/proc/self/fd")) == before
