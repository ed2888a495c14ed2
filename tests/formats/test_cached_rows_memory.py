"""Memory of the row cache: its ceiling, and which records stay and go."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from _row_cache import BUNDLES, plain

from tolkit_formats import Bundle, open_bundle
from tolkit_formats.cached_rows import CachedRows
from tolkit_formats.errors import UsageError
from tolkit_formats.frame_plan import least_cache_bytes, plan_frames
from tolkit_formats.frames import Frames


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    BUNDLES[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


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
