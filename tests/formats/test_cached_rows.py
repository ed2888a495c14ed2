"""The row cache: right rows, one read each, within its memory, and errors that name the place."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _bands import write_bands
from _coded import write_coded
from _nano import ALL_CODECS, NF4, RAW_F32, edit_record, fault_hook, svd, write_nano

from tolkit_formats import Bundle, open_bundle
from tolkit_formats.cached_rows import CachedRows
from tolkit_formats.errors import BundleError, ResourceError, UsageError
from tolkit_formats.frame_plan import least_cache_bytes, plan_frames
from tolkit_formats.frames import Frames
from tolkit_formats.row_statistics import TableStatistics

BUNDLES: dict[str, Callable[[Path], object]] = {
    "all codecs": lambda path: write_nano(path, ALL_CODECS),
    "no counts": lambda path: write_nano(path, [NF4, svd(5, NF4)], counts=False),
    "raw f32": lambda path: write_nano(path, [RAW_F32] * 3, hidden_size=7),
    "one token": lambda path: write_nano(path, [RAW_F32], vocab_size=1, tokenizer=False),
    "three tiers, predictors": write_bands,
    "coded, two tiers": write_coded,
    "coded, a tier of means": lambda path: write_coded(path, counts=(1,)),
    "shards": lambda path: write_nano(path, [NF4], vocab_size=2500, max_shard_bytes=1),
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    BUNDLES[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


def plain(path: Path, *, counts: bool = False, vocab_size: int = 40) -> Bundle:
    """Slots are token ids, unless there are counts."""
    return open_bundle(write_nano(path, [NF4], counts=counts, vocab_size=vocab_size).path)


class Watch:
    """Counts reads of records; fails those it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.reads: list[str] = []
        self._fail_at = fail_at

    def __call__(self, operation: str, path: str) -> None:
        if operation == "pread":
            self.reads.append(path)
            if len(self.reads) - 1 == self._fail_at:
                raise OSError(errno.EIO, "Input/output error")


# Rows.


@pytest.mark.parametrize("extra_bytes", [0, 100, 1000, 1 << 20])
@pytest.mark.parametrize("seed", [True, False])
def test_rows_are_those_of_the_reader(bundle: Bundle, extra_bytes: int, seed: bool) -> None:
    rng = np.random.default_rng(0)
    cache_bytes = least_cache_bytes(bundle) + extra_bytes
    with CachedRows(bundle, cache_bytes=cache_bytes, seed=seed) as cached:
        for count in (0, 1, 1, 7, 300, 3, 300):
            ids = rng.integers(0, bundle.vocab_size, count)
            if count == 7:
                cached.prefetch(ids)
            np.testing.assert_array_equal(cached.rows(ids), bundle.rows(ids))
        seen = cached.statistics
        assert seen.cache_bytes == cache_bytes >= seen.resident_bytes
        assert seen.rows_asked == 612
        if not seed and extra_bytes == 1 << 20 and bundle.vocab_size < 100:
            assert seen.rows_read <= bundle.vocab_size


def test_planes_of_loaded_records(tmp_path: Path) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol", ALL_CODECS).path)
    ids = [3, 39, 3, 0, 17]
    want = bundle.records(ids)
    with CachedRows(bundle, cache_bytes=least_cache_bytes(bundle) + 900, seed=False) as cached:
        cached.load(ids)
        for place, plane in enumerate(bundle.manifest.tiers[0].planes):
            ((_, _, plane_nB),) = cached.plane(ids, place)
            stop = plane.offset + plane.length
            np.testing.assert_array_equal(plane_nB, want[:, plane.offset : stop])


def test_wrong_ids(tmp_path: Path) -> None:
    with CachedRows(plain(tmp_path / "b.tol")) as cached:
        for ids, what in (([40], "40: out of range"), ([-1], "-1: out"), ([[1]], "1-D")):
            for ask in (cached.rows, cached.records, cached.load, cached.prefetch):
                with pytest.raises(UsageError, match=what):
                    ask(ids)
        assert cached.rows([]).shape == (0, 1, 24)


# Memory.


def test_the_ceiling_counts_everything(bundle: Bundle) -> None:
    least = least_cache_bytes(bundle)
    for cache_bytes in (least, least + 777, least + 5000, 1 << 22):
        for seeded in (False, True):
            plan = plan_frames(bundle, cache_bytes, seeded=seeded)
            total = sum(8 * tier.num_rows for tier in bundle.manifest.tiers if tier.coded)
            for tier, part in zip(bundle.manifest.tiers, plan, strict=True):
                frames = Frames(tier.num_rows, tier.stride, part.count, part.kept)
                frames._tick = 1
                frames._fill_queue(part.count)  # the most it is ever asked for
                arrays = [value for value in vars(frames).values() if hasattr(value, "nbytes")]
                total += sum(array.nbytes for array in arrays)
            assert total <= cache_bytes
    whole = plan_frames(bundle, 1 << 22, seeded=True)
    assert [part.count for part in whole] == [tier.num_rows for tier in bundle.manifest.tiers]


def test_no_room_for_a_record_is_refused(bundle: Bundle) -> None:
    least = least_cache_bytes(bundle)
    with pytest.raises(UsageError, match=f"expected at least {least:,}") as caught:
        CachedRows(bundle, cache_bytes=least - 1)
    assert caught.value.exit_code == 2


def test_cache_of_one_record(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol")
    with CachedRows(bundle, cache_bytes=least_cache_bytes(bundle)) as cached:
        for ids in ([1], [1], [2], [2, 1, 0], [1]):
            np.testing.assert_array_equal(cached.rows(ids), bundle.rows(ids))
        # read: 1, 2, then 0 and 1 (2 is there; 0 is kept for it comes first), then 1
        assert cached.statistics.rows_read == 5
        assert cached.statistics.cache_hits == 2


def slow_lru(trace: list[int], count: int) -> list[bool]:
    """Which look-ups hit, one id at a time."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for token in trace:
        hits.append(token in held)
        held[token] = None
        held.move_to_end(token)
        if len(held) > count:
            held.popitem(last=False)
    return hits


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_what_was_used_longest_ago_goes(tmp_path: Path, count: int) -> None:
    bundle = plain(tmp_path / "b.tol", vocab_size=150)
    cache_bytes = least_cache_bytes(bundle) + (count - 1) * Frames.frame_bytes(
        bundle.manifest.tiers[0].stride
    )
    trace = (np.random.default_rng(1).zipf(1.2, 2000) % 150).tolist()
    with CachedRows(bundle, cache_bytes=cache_bytes, seed=False) as cached:
        before, hits = 0, []
        for token in trace:
            cached.records([token])
            hits.append(cached.statistics.cache_hits > before)
            before = cached.statistics.cache_hits
    assert hits == slow_lru(trace, count)


def test_half_of_a_seeded_cache_stays_with_the_frequent(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol", counts=True, vocab_size=100)
    frame_bytes = Frames.frame_bytes(bundle.manifest.tiers[0].stride)
    token_of_slot = np.argsort(bundle.slot_of_token)
    with CachedRows(bundle, cache_bytes=least_cache_bytes(bundle) + 20 * frame_bytes) as cached:
        assert cached.statistics.prefetched_rows == cached.statistics.rows_read == 21
        cached.rows(token_of_slot[:21])
        assert cached.statistics.rows_read == 21
        for token in token_of_slot[30:100]:
            cached.rows([token])
        read = cached.statistics.rows_read
        cached.rows(token_of_slot[:10])
        assert cached.statistics.rows_read == read
        cached.rows(token_of_slot[10:21])
        assert cached.statistics.rows_read == read + 11


# Reads.


def test_one_read_a_token_and_none_when_it_is_there(bundle: Bundle) -> None:
    ids = list(range(0, bundle.vocab_size, 2))
    with CachedRows(bundle, cache_bytes=4 << 20, seed=False) as cached:
        for tier in bundle.manifest.tiers:  # shards are compared with their digests first
            for shard in range(tier.num_shards):
                cached._files._get_ready(cached._files._shards[tier.index, shard], 0)
        slots = np.sort(bundle.slots_of(ids))
        runs = 1 + int(np.count_nonzero(np.diff(slots) != 1))
        watch = Watch()
        with fault_hook(watch):
            cached.records([*ids, *ids])
        borders = sum(
            int(first in slots and first - 1 in slots)
            for tier in bundle.manifest.tiers
            for first in range(
                tier.first_slot, tier.first_slot + tier.num_rows, tier.rows_per_shard
            )
        )
        assert len(watch.reads) == runs + borders
        with fault_hook(watch):
            cached.records(ids)
            cached.rows(ids[::-1])
        assert len(watch.reads) == runs + borders


def test_statistics_of_a_trace_by_hand(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol")
    stride = bundle.manifest.tiers[0].stride
    cache_bytes = least_cache_bytes(bundle) + Frames.frame_bytes(stride)
    with CachedRows(bundle, cache_bytes=cache_bytes) as cached:  # two records, no counts: no seed
        cached.rows([5, 6, 5])  # reads 5 and 6
        cached.rows([5])  # hit
        cached.rows([7])  # reads 7, 6 goes
        cached.rows([6, 5])  # hit 5, reads 6, 7 goes
        cached.prefetch([8])
        cached.rows([8])  # read ahead
        assert cached.statistics == TableStatistics(
            rows_asked=8,
            rows_distinct=7,
            rows_read=5,
            bytes_read=5 * stride,
            cache_hits=3,
            prefetched_rows=1,
            cache_bytes=cache_bytes,
            resident_bytes=2 * stride,
        )
        assert cached.statistics.hit_rate == 3 / 7
        before = cached.statistics
        cached.rows([8])
        assert cached.statistics.since(before) == TableStatistics(
            rows_asked=1,
            rows_distinct=1,
            cache_hits=1,
            cache_bytes=cache_bytes,
            resident_bytes=2 * stride,
        )
    assert TableStatistics().hit_rate == 0.0


def test_rows_wait_for_what_is_being_read(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol")
    started, go_on = threading.Event(), threading.Event()

    def hold(operation: str, path: str) -> None:
        if operation == "pread" and threading.current_thread() is not threading.main_thread():
            started.set()
            assert go_on.wait(10)

    with CachedRows(bundle) as cached:
        cached.rows([0])
        with fault_hook(hold):
            cached.prefetch([11, 12])
            assert started.wait(10)
            cached.rows([30])  # not held up by it
            threading.Timer(0.05, go_on.set).start()
            np.testing.assert_array_equal(cached.rows([12]), bundle.rows([12]))
        assert cached.statistics.rows_read == 4
        assert cached.statistics.prefetched_rows == 2


def test_many_threads_get_right_rows(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "b.tol", counts=True)
    want = bundle.rows(range(40))
    wrong: list[object] = []

    def ask(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(60):
            ids = rng.integers(0, 40, 6)
            cached.prefetch(rng.integers(0, 40, 6))
            if not np.array_equal(cached.rows(ids), want[ids]):
                wrong.append(ids)

    with CachedRows(bundle, cache_bytes=least_cache_bytes(bundle) + 500) as cached:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# Damage.


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
