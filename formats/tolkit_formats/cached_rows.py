"""Rows of a bundle on disk through a cache of bounded memory. numpy only.

n ids asked for, N distinct rows, S record stride, D hidden, B bytes of a plane.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import TolError
from tolkit_formats.frame_plan import FramePlan, plan_frames
from tolkit_formats.frames import Frames
from tolkit_formats.reader import Bundle, Where
from tolkit_formats.record_files import RecordFiles
from tolkit_formats.records import Tier
from tolkit_formats.row_statistics import TableStatistics

__all__ = ["DEFAULT_CACHE_BYTES", "CachedRows"]

DEFAULT_CACHE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_MAX_WAITING = 4

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]
Piece = tuple[Tier, Where, _U8]


class CachedRows:
    """Reads records by need, once each, and keeps the frequent and the recent ones.

    What is kept are stored records, compressed as they are; entropy-coded ones are kept as the
    symbols they decode to, a byte each, because decoding is what costs there and the operating
    system keeps the file's bytes anyway. Safe to use from several threads.

    Args:
        bundle: open bundle. Its records are read through descriptors opened here, not mapped.
        cache_bytes: memory for the cache, all its bookkeeping counted; a hard ceiling. What a
            call returns, and 1 MiB to read through, come on top.
        seed: where token counts are known, read the most frequent records now, and keep half of
            the cache for them.

    Raises:
        UsageError: `cache_bytes` has no room for one record of each tier; says how many it needs.
        BundleError: a shard is not what the bundle was opened with, or damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        seed: bool = True,
    ) -> None:
        self.bundle = bundle
        # slots follow the counts exactly where a map of slots is stored (SPEC section 5)
        known = bundle.token_counts() is not None and bundle.slot_of_token is not None
        plan = plan_frames(bundle, cache_bytes, seeded=seed and known)
        self._cache_bytes = cache_bytes
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._waiting: list[tuple[_I64, Future[None]]] = []
        self._files = RecordFiles(bundle)
        try:
            self._frames = {
                tier.index: Frames(tier.num_rows, tier.stride, part.count, part.kept)
                for tier, part in zip(bundle.manifest.tiers, plan, strict=True)
            }
            if seed and known:
                self._seed(plan)
        except BaseException:
            self._files.close()
            raise

    @property
    def statistics(self) -> TableStatistics:
        """What was asked and read so far."""
        with self._lock:
            held = sum(f.held * f.data_FS.shape[1] for f in self._frames.values())
            return TableStatistics(
                cache_bytes=self._cache_bytes, resident_bytes=held, **self._counts
            )

    def rows(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Decoded rows; arguments, result and errors as `Bundle.rows`, and as `records`."""
        return self.bundle.decoded(token_ids, self.records(token_ids))

    def records(self, token_ids: npt.ArrayLike) -> list[Piece]:
        """Stored records of tokens, in any order, repeats allowed.

        Returns:
            for each tier touched: it, an index of the ids [n] that lie in it, and U8 [those, S],
            copied; symbols where records are coded.

        Raises:
            UsageError: an id out of range.
            BundleError: a token without a record; a damaged, cut or changed file.
            ResourceError: the disk failed.
        """
        slots = self.bundle.slots_of(token_ids)
        return [
            (tier, where, self._records(tier, slots[where] - tier.first_slot))
            for tier, where in self.bundle.by_tier(slots)
        ]

    def load(self, token_ids: npt.ArrayLike) -> None:
        """Read and check records that are not here, keeping what fits; for `plane`.

        Unlike `records` it needs memory for 1 MiB of them at a time.
        """
        slots = self.bundle.slots_of(token_ids)
        for tier, where in self.bundle.by_tier(slots):
            rows_N = np.unique(slots[where]) - tier.first_slot
            self._count(len(slots[where]), len(rows_N))
            missing_N = self._missing(tier, rows_N)
            self._wait_for(missing_N + tier.first_slot)
            missing_N = self._missing(tier, missing_N)
            self._add(cache_hits=len(rows_N) - len(missing_N))
            for chunk_N in _chunks(missing_N, tier.stride):
                self._keep(tier, chunk_N, self._read(tier, chunk_N))

    def plane(self, token_ids: npt.ArrayLike, place: int) -> list[Piece]:
        """One kept plane's bytes of tokens that `load` was called for, U8 [n, B]. Not coded ones.

        Records that are no longer, or were never, kept are read again, this plane of them alone.
        """
        slots = self.bundle.slots_of(token_ids)
        pieces: list[Piece] = []
        for tier, where in self.bundle.by_tier(slots):
            rows_N, inverse = np.unique(slots[where] - tier.first_slot, return_inverse=True)
            plane_NB = self._plane(tier, rows_N, place)
            pieces.append((tier, where, plane_NB if _is_range(inverse) else plane_NB[inverse]))
        return pieces

    def prefetch(self, token_ids: npt.ArrayLike) -> None:
        """Start reading records into the cache on a thread of its own; returns at once.

        Of more than the cache has room for, the most frequent are read. `records` waits for what
        is under way. A failed read is left to whoever asks for the record, who gets the error.
        """
        slots = self.bundle.slots_of(token_ids)
        with self._lock:
            self._waiting = [entry for entry in self._waiting if not entry[1].done()]
            if len(self._waiting) >= _MAX_WAITING:
                return
        for tier, where in self.bundle.by_tier(slots):
            rows_N = self._missing(tier, np.unique(slots[where]) - tier.first_slot)
            rows_N = rows_N[: self._frames[tier.index].room]
            if len(rows_N):
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(1, "tolkit-prefetch")
                future = self._executor.submit(self._read_ahead, tier, rows_N)
                with self._lock:
                    self._waiting.append((rows_N + tier.first_slot, future))

    def close(self) -> None:
        """End the reading thread and close the files. Calling it again does nothing."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
        self._files.close()

    def __enter__(self) -> CachedRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _records(self, tier: Tier, asked_n: _I64) -> _U8:
        """Records [n, S] of rows of one tier, in the order asked for."""
        frames = self._frames[tier.index]
        rows_N, inverse = asked_n, None
        if len(asked_n) > 1:
            rows_N, inverse = np.unique(asked_n, return_inverse=True)
        self._count(len(asked_n), len(rows_N))
        missing_N = self._missing(tier, rows_N)
        if len(missing_N):
            self._wait_for(missing_N + tier.first_slot)
        with self._lock:
            found_N = frames.find(rows_N)
            here_N = found_N >= 0
            frames.touch(found_N[here_N])
            hits = int(np.count_nonzero(here_N))
            self._counts["cache_hits"] += hits
            if hits == len(rows_N):
                return frames.data_FS.take(found_N if inverse is None else found_N[inverse], axis=0)
            out_NS = np.empty((len(rows_N), tier.stride), np.uint8)
            out_NS[here_N] = frames.data_FS[found_N[here_N]]
        places = np.flatnonzero(~here_N)
        done = 0
        for chunk_N in _chunks(rows_N[places], tier.stride):
            read_NS = self._read(tier, chunk_N)
            out_NS[places[done : done + len(chunk_N)]] = read_NS
            done += len(chunk_N)
            self._keep(tier, chunk_N, read_NS)
        if inverse is None or _is_range(inverse):
            return out_NS
        return out_NS.take(inverse, axis=0)

    def _plane(self, tier: Tier, rows_N: _I64, place: int) -> _U8:
        assert not tier.coded, "symbols of a coded row cannot be read one by one"
        plane, frames = tier.planes[place], self._frames[tier.index]
        out_NB = np.empty((len(rows_N), plane.length), np.uint8)
        with self._lock:
            found_N = frames.find(rows_N)
            here_N = found_N >= 0
            frames.touch(found_N[here_N])
            stored_FB = frames.data_FS[:, plane.offset : plane.offset + plane.length]
            out_NB[here_N] = stored_FB[found_N[here_N]]
        if not here_N.all():
            read_NB = np.empty((int(np.count_nonzero(~here_N)), plane.length), np.uint8)
            size_bytes = self._files.read_plane(tier, plane, rows_N[~here_N], read_NB)
            out_NB[~here_N] = read_NB
            self._add(bytes_read=size_bytes)
        return out_NB

    def _seed(self, plan: list[FramePlan]) -> None:
        """Fill the cache with the first slots, which are the most frequent tokens."""
        for tier, part in zip(self.bundle.manifest.tiers, plan, strict=True):
            for rows_N in _chunks(np.arange(part.count), tier.stride):
                self._frames[tier.index].fill(int(rows_N[0]), self._read(tier, rows_N))
            self._add(prefetched_rows=part.count)

    def _read_ahead(self, tier: Tier, rows_N: _I64) -> None:
        for chunk_N in _chunks(rows_N, tier.stride):
            chunk_N = self._missing(tier, chunk_N)
            if not len(chunk_N):
                continue
            try:
                records_NS = self._read(tier, chunk_N)
            except TolError:
                return  # who asks for these records reads them again, and hears of it
            self._keep(tier, chunk_N, records_NS)
            self._add(prefetched_rows=len(chunk_N))

    def _wait_for(self, slots_N: _I64) -> None:
        """Until nothing that is being read ahead is among these slots."""
        with self._lock:
            waiting = list(self._waiting)
        for ahead_N, future in waiting:
            if not future.done() and np.isin(slots_N, ahead_N, assume_unique=True).any():
                future.result()

    def _missing(self, tier: Tier, rows_N: _I64) -> _I64:
        with self._lock:
            return rows_N[self._frames[tier.index].find(rows_N) < 0]

    def _read(self, tier: Tier, rows_N: _I64) -> _U8:
        records_NS = np.empty((len(rows_N), tier.stride), np.uint8)
        size_bytes = self._files.read(tier, rows_N, records_NS)
        self._add(rows_read=len(rows_N), bytes_read=size_bytes)
        return records_NS

    def _keep(self, tier: Tier, rows_N: _I64, records_NS: _U8) -> None:
        with self._lock:
            self._frames[tier.index].place(rows_N, records_NS)

    def _count(self, asked: int, distinct: int) -> None:
        self._add(rows_asked=asked, rows_distinct=distinct)

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


def _chunks(rows_N: _I64, stride: int) -> list[_I64]:
    """Rows in pieces whose records take at most 1 MiB, at least one each."""
    size = max(1, _CHUNK_BYTES // max(1, stride))
    return [rows_N[at : at + size] for at in range(0, len(rows_N), size)]


def _is_range(inverse: npt.NDArray[np.intp]) -> bool:
    return bool((inverse == np.arange(len(inverse))).all())
