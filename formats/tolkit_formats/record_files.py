"""Records read from disk by descriptor: each once, neighbours together, every one checked.

N rows asked for, S record stride, B bytes of a plane. Rows count from their tier's first slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit_formats.entropy import length_dtype
from tolkit_formats.errors import BundleError, ResourceError
from tolkit_formats.files import bytes_view
from tolkit_formats.limits import CHECKSUM_BLOCK_BYTES
from tolkit_formats.random_file import RandomFile
from tolkit_formats.reader import Bundle
from tolkit_formats.records import CRC_BYTES, Plane, Tier, crc_of_bytes, crc_of_records
from tolkit_formats.tensorfile import TensorFile

__all__ = ["RecordFiles"]

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]


@dataclass
class _Shard:
    """One open shard: where its records start in the file, and where coded ones end."""

    file: RandomFile
    name: str
    first_row: int
    start: int
    ends_N: _I64 | None = None
    known: bool = False


class RecordFiles:
    """The record shards of a bundle, all opened when made. Safe to use from several threads.

    Args:
        bundle: open bundle. Unless it was opened without checks, the CRC-32 of every record read
            is compared, and once a shard that the file is this bundle's.

    Raises:
        BundleError: a shard is no longer what the bundle held when it was opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._check_crc = bundle.shards.check_crc
        self._shards = {
            (tier.index, shard): self._open(tier, shard)
            for tier in bundle.manifest.tiers
            for shard in range(tier.num_shards)
        }

    @staticmethod
    def memory_bytes(bundle: Bundle) -> int:
        """What is kept in memory at most: the ends of coded records."""
        return sum(8 * tier.num_rows for tier in bundle.manifest.tiers if tier.coded)

    def read(self, tier: Tier, rows_N: _I64, out_NS: _U8) -> int:
        """Records of distinct rows in rising order, into `out_NS` (C-contiguous, mutated).

        Coded records are decoded: a byte a symbol. Returns the bytes read.

        Raises:
            BundleError: a record that does not match its CRC-32, a file that was cut or changed.
            ResourceError: the disk failed. Either names the file and the slot.
        """
        size_bytes = 0
        for shard, part in self._parts(tier, rows_N):
            if tier.coded:
                size_bytes += self._read_coded(tier, shard, rows_N[part], out_NS[part])
            else:
                self._read_plain(tier, shard, rows_N[part], out_NS[part])
                size_bytes += out_NS[part].nbytes
        return size_bytes

    def read_plane(self, tier: Tier, plane: Plane, rows_N: _I64, out_NB: _U8) -> int:
        """One plane's bytes of rows read whole before, without a CRC. Not for coded records.

        A file written to since it was opened is noticed by its size and time of change.
        """
        for shard, part in self._parts(tier, rows_N):
            for row, out_B in zip(rows_N[part].tolist(), out_NB[part], strict=True):
                at = shard.start + (row - shard.first_row) * tier.stride + plane.offset
                with _naming(tier.first_slot + row):
                    shard.file.read_into(out_B, at)
            shard.file.require_unchanged()
        return out_NB.nbytes

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards.values():
            shard.file.close()

    def _parts(self, tier: Tier, rows_N: _I64) -> Iterator[tuple[_Shard, slice]]:
        """The rows of each shard touched; checks the shard at its first touch."""
        numbers = rows_N // tier.rows_per_shard
        first = 0
        while first < len(rows_N):
            number = int(numbers[first])
            stop = int(np.searchsorted(numbers, number, side="right"))
            shard = self._shards[tier.index, number]
            if not shard.known:
                self._get_ready(shard, tier.first_slot + int(rows_N[first]))
            yield shard, slice(first, stop)
            first = stop

    def _read_plain(self, tier: Tier, shard: _Shard, rows_N: _I64, out_NS: _U8) -> None:
        for first, stop in _runs(rows_N):
            row = int(rows_N[first])
            with _naming(tier.first_slot + row):
                at = shard.start + (row - shard.first_row) * tier.stride
                shard.file.read_into(out_NS[first:stop], at)
        shard.file.require_unchanged()
        if self._check_crc:
            slots_N = rows_N + tier.first_slot
            stored_N = np.ascontiguousarray(out_NS[:, -CRC_BYTES:]).view("<u4")[:, 0]
            wrong_N = crc_of_records(out_NS, slots_N) != stored_N
            if wrong_N.any():
                raise self._damaged(shard, int(slots_N[wrong_N][0]), "does not match its CRC-32")

    def _read_coded(self, tier: Tier, shard: _Shard, rows_N: _I64, out_NS: _U8) -> int:
        assert shard.ends_N is not None
        own_N = rows_N - shard.first_row
        ends_N = shard.ends_N[own_N]
        starts_N = np.where(own_N > 0, shard.ends_N[own_N - 1], 0)
        lengths_N = ends_N - starts_N
        at_N = np.cumsum(lengths_N) - lengths_N
        data = np.empty(int(lengths_N.sum()), np.uint8)
        for first, stop in _runs(rows_N):
            with _naming(tier.first_slot + int(rows_N[first])):
                piece = data[at_N[first] : at_N[stop - 1] + lengths_N[stop - 1]]
                shard.file.read_into(piece, shard.start + int(starts_N[first]))
        shard.file.require_unchanged()
        slots_N = rows_N + tier.first_slot
        self._check_coded(shard, data, slots_N, at_N, lengths_N)
        coder = self._bundle.coder(tier)
        bodies_N = np.maximum(lengths_N - CRC_BYTES, 0)
        try:
            out_NS[:] = coder.decode(data, at_N, bodies_N)
        except BundleError as error:
            what = f"or one asked for with it is no entropy-coded row ({error.message})"
            raise self._damaged(shard, int(slots_N[0]), what) from None
        return len(data)

    def _check_coded(
        self, shard: _Shard, data: _U8, slots_N: _I64, at_N: _I64, lengths_N: _I64
    ) -> None:
        for slot, at, length in zip(
            slots_N.tolist(), at_N.tolist(), lengths_N.tolist(), strict=True
        ):
            body = at + length - CRC_BYTES
            if body < at:
                raise self._damaged(shard, slot, f"has {length} bytes, its CRC-32 alone has 4")
            stored = int.from_bytes(data[body : at + length].tobytes(), "little")
            if self._check_crc and crc_of_bytes(data[at:body].data, slot) != stored:
                raise self._damaged(shard, slot, "does not match its CRC-32")

    def _open(self, tier: Tier, number: int) -> _Shard:
        name = tier.shard_name(number)
        path = self._bundle.path / "tables" / name
        file = RandomFile(path)
        try:
            return self._located(tier, number, file, TensorFile(path))
        except BaseException:
            file.close()
            raise

    def _located(self, tier: Tier, number: int, file: RandomFile, header: TensorFile) -> _Shard:
        rows = tier.shard_rows(number)
        info = header.infos.get("records")
        shape = info.shape if tier.coded and info else (rows, tier.stride)
        if info is None or info.dtype != "U8" or info.shape != shape or len(shape) > 2:
            raise BundleError(f"{file.path}: is not the shard the bundle was opened with")
        shard = _Shard(file, tier.shard_name(number), number * tier.rows_per_shard, info.start)
        if tier.coded:
            lengths_N = header.expect("lengths", length_dtype(tier.stride), (rows,))
            shard.ends_N = np.cumsum(lengths_N, dtype=np.int64)
            if shard.ends_N[-1] != info.end - info.start:
                raise BundleError(
                    f"{file.path}: lengths add up to {shard.ends_N[-1]:,} bytes, "
                    f"records have {info.end - info.start:,}"
                )
        return shard

    def _get_ready(self, shard: _Shard, slot: int) -> None:
        """Once a shard: its first and last block are those the bundle was published with."""
        if self._check_crc:
            checksums = self._bundle.tensor_file("tables/checksums.safetensors")
            size_bytes = shard.file.size_bytes
            blocks = -(-size_bytes // CHECKSUM_BLOCK_BYTES)
            expected = checksums.expect(shard.name, "U8", (blocks, 32))
            for block in {0, blocks - 1}:
                start = block * CHECKSUM_BLOCK_BYTES
                data = np.empty(min(CHECKSUM_BLOCK_BYTES, size_bytes - start), np.uint8)
                with _naming(slot):
                    shard.file.read_into(data, start)
                if hashlib.sha256(bytes_view(data)).digest() != expected[block].tobytes():
                    raise BundleError(
                        f"{shard.file.path}: is damaged, or a file of another bundle",
                        hint=f"run: tol verify {self._bundle.path}",
                    )
        shard.known = True

    def _damaged(self, shard: _Shard, slot: int, what: str) -> BundleError:
        return BundleError(
            f"{shard.file.path}: record in slot {slot} {what}: damaged",
            hint=f"run: tol verify {self._bundle.path}",
        )


def _runs(rows_N: _I64) -> Iterator[tuple[int, int]]:
    """Index ranges of rows that follow each other."""
    breaks = (np.flatnonzero(np.diff(rows_N) != 1) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(rows_N)], strict=True)


@contextmanager
def _naming(slot: int) -> Iterator[None]:
    """Errors of a read with the slot in them."""
    try:
        yield
    except (BundleError, ResourceError) as error:
        message = f"{error.message}, reading the record in slot {slot}"
        raise type(error)(message, hint=error.hint) from error
