"""The record shards of an open bundle: mapped, and believed only after a check.

N rows asked for, S record stride.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit_formats.coded_shards import CodedShard
from tolkit_formats.errors import BundleError
from tolkit_formats.limits import CHECKSUM_BLOCK_BYTES
from tolkit_formats.manifest import Manifest
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier, crc_of_records
from tolkit_formats.tensorfile import TensorFile

__all__ = ["RecordShards"]

_KEPT_BYTES = 64 << 20

Records = npt.NDArray[np.uint8]


class RecordShards:
    """All shards of a bundle, opened (headers checked) when made.

    Args:
        path: the bundle's folder.
        manifest: its manifest.
        checksums: opens tables/checksums.safetensors, digest checked; called on first use.
        coder: makes the coder of a tier of coded records; called on first use.
        check_crc: compare each record's CRC-32 when it is first read, and once a shard that the
            file is this bundle's.

    Coded records are decoded here: everyone else sees a byte a symbol at the places that planes
    say, as if that had been stored.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        checksums: Callable[[], TensorFile],
        coder: Callable[[Tier], RowCoder],
        *,
        check_crc: bool,
    ) -> None:
        self._path = path
        self._checksums = checksums
        self._coder = coder
        self._coded: dict[tuple[int, int], CodedShard] = {}
        self._decoded = _DecodedRuns()
        self._check_crc = check_crc
        self._files: dict[tuple[int, int], TensorFile] = {}
        self._shards: dict[tuple[int, int], Records] = {}
        for tier in manifest.tiers:
            for shard in range(tier.num_shards):
                self._open(tier, shard)
        self._seen_V = np.zeros(manifest.num_rows, bool)
        self._known: set[tuple[int, int]] = set()

    @property
    def check_crc(self) -> bool:
        """Whether what is read is compared with its checksums."""
        return self._check_crc

    def take(self, tier: Tier, slots: npt.NDArray[np.int64]) -> Records:
        """Checked records [N, S] of slots that lie in `tier`, copied."""
        if tier.coded:
            return self._take_coded(tier, slots)
        rows = slots - tier.first_slot
        touched = [0] if len(rows) else []
        if tier.num_shards == 1:
            records = self._shards[tier.index, 0].take(rows, axis=0)
        else:
            records = np.empty((len(rows), tier.stride), np.uint8)
            shards = rows // tier.rows_per_shard
            touched = [int(shard) for shard in np.unique(shards)]
            for shard in touched:
                here = shards == shard
                first = shard * tier.rows_per_shard
                records[here] = self._shards[tier.index, shard].take(rows[here] - first, axis=0)
        if self._check_crc:
            self._check_first_touch(tier, slots, records)
            for shard in touched:
                self._check_shard(tier, shard)
        return records

    def run(self, tier: Tier, first: int, stop: int) -> Records:
        """Checked records [stop - first, S] of consecutive rows of a tier, as mapped.

        The rows must lie within one shard. Coded ones are decoded, and kept for the next planes
        that are read of the same rows.
        """
        if tier.coded:
            slots = np.arange(first, stop, dtype=np.int64) + tier.first_slot
            key = (tier.index, first, stop)
            return self._decoded.get(key, lambda: self._take_coded(tier, slots))
        records = self.unchecked_run(tier, first, stop)
        if self._check_crc:
            slots = np.arange(first, stop, dtype=np.int64) + tier.first_slot
            self._check_first_touch(tier, slots, records)
            self._check_shard(tier, first // tier.rows_per_shard)
        return records

    def unchecked_run(self, tier: Tier, first: int, stop: int) -> Records:
        """`run` without a look at the content; for `verify`, which does its own.

        Coded records are decoded, their CRCs compared.
        """
        if tier.coded:
            rows = np.arange(first, stop, dtype=np.int64)
            return self._decode(tier, rows, np.ones(len(rows), bool))
        shard, row = divmod(first, tier.rows_per_shard)
        return self._shards[tier.index, shard][row : row + stop - first]

    def _take_coded(self, tier: Tier, slots: npt.NDArray[np.int64]) -> Records:
        fresh = ~self._seen_V[slots] if self._check_crc else np.zeros(len(slots), bool)
        rows = slots - tier.first_slot
        records = self._decode(tier, rows, fresh)
        if self._check_crc:
            for shard in np.unique(rows // tier.rows_per_shard).tolist():
                self._check_shard(tier, shard)
            self._seen_V[slots] = True
        return records

    def _decode(
        self, tier: Tier, rows: npt.NDArray[np.int64], fresh: npt.NDArray[np.bool_]
    ) -> Records:
        coder = self._coder(tier)
        shards = rows // tier.rows_per_shard
        touched = np.unique(shards).tolist()
        if len(touched) == 1:
            first = touched[0] * tier.rows_per_shard
            return self._coded[tier.index, touched[0]].decode(rows - first, fresh, coder)
        records = np.empty((len(rows), tier.stride), np.uint8)
        for shard in touched:
            here = shards == shard
            own = rows[here] - shard * tier.rows_per_shard
            records[here] = self._coded[tier.index, shard].decode(own, fresh[here], coder)
        return records

    def _open(self, tier: Tier, shard: int) -> None:
        path = self._path / "tables" / tier.shard_name(shard)
        file = TensorFile(path, random_access=True)
        self._files[tier.index, shard] = file
        if tier.coded:
            self._coded[tier.index, shard] = CodedShard(file, tier, shard)
            return
        if file.names != ("records",):
            raise BundleError(
                f"{path}: holds {list(file.names)[:3]}, expected one tensor 'records'"
            )
        records = file.expect("records", "U8", (tier.shard_rows(shard), tier.stride))
        self._shards[tier.index, shard] = records.view(np.uint8)

    def _check_shard(self, tier: Tier, shard: int) -> None:
        """Once a shard: its first and last block are the ones this bundle was published with.

        A record's CRC says which slot it is for, but not of which bundle.
        """
        if (tier.index, shard) in self._known:
            return
        file = self._files[tier.index, shard]
        blocks = -(-file.size_bytes // CHECKSUM_BLOCK_BYTES)
        expected = self._checksums().expect(tier.shard_name(shard), "U8", (blocks, 32))
        for block in {0, blocks - 1}:
            start = block * CHECKSUM_BLOCK_BYTES
            if file.block_sha256(start, start + CHECKSUM_BLOCK_BYTES) != expected[block].tobytes():
                raise BundleError(
                    f"{file.path}: is damaged, or a file of another bundle",
                    hint=f"run: tol verify {self._path}",
                )
        self._known.add((tier.index, shard))

    def _check_first_touch(
        self, tier: Tier, slots: npt.NDArray[np.int64], records: npt.NDArray[np.uint8]
    ) -> None:
        fresh = ~self._seen_V[slots]
        if not fresh.any():
            return
        stored = np.ascontiguousarray(records[fresh, -4:]).view("<u4").reshape(-1)
        wrong = crc_of_records(records[fresh], slots[fresh]) != stored
        if wrong.any():
            slot = int(slots[fresh][wrong][0])
            name = tier.shard_name((slot - tier.first_slot) // tier.rows_per_shard)
            raise BundleError(
                f"{self._path}/tables/{name}: record in slot {slot} does not match its CRC-32: "
                "damaged",
                hint=f"run: tol verify {self._path}",
            )
        self._seen_V[slots] = True


class _DecodedRuns:
    """The runs of decoded records read last, so that reading plane by plane decodes a row once.

    Safe to use from several threads; the oldest runs go when there are more than _KEPT_BYTES.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int, int], Records] = {}
        self._size_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int, int], decode: Callable[[], Records]) -> Records:
        """The records of a run, decoded unless they are still there."""
        with self._lock:
            known = self._runs.get(key)
        if known is not None:
            return known
        records = decode()
        with self._lock:
            if key not in self._runs:
                self._runs[key] = records
                self._size_bytes += records.nbytes
            while self._size_bytes > _KEPT_BYTES and len(self._runs) > 1:
                self._size_bytes -= self._runs.pop(next(iter(self._runs))).nbytes
        return records
