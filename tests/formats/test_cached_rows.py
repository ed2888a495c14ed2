"""The row cache: right rows, one read each, from any number of threads."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from _nano import ALL_CODECS, fault_hook, write_nano
from _row_cache import BUNDLES, Watch, plain

from tolkit_formats import Bundle, open_bundle
from tolkit_formats.cached_rows import CachedRows
from tolkit_formats.errors import UsageError
from tolkit_formats.frame_plan import least_cache_bytes
from tolkit_formats.frames import Frames
from tolkit_formats.row_statistics import TableStatistics


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    BUNDLES[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


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
