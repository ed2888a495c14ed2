"""Where a token's bytes lie: planes within a record, records within shards (SPEC section 4).

record = planes in layer order, each [scales][codes] | zero padding | CRC-32 of slot and rest.
coded record = entropy-coded bytes of the planes | CRC-32 of slot and those bytes.
Letters: N rows, S stride in bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit_formats.codecs import Codec
from tolkit_formats.limits import BLOCK_ROWS, MAX_SHARD_BYTES, MAX_VOCAB_SIZE

__all__ = [
    "CRC_BYTES",
    "STRIDE_MULTIPLE",
    "Plane",
    "Tier",
    "crc_of_bytes",
    "crc_of_records",
    "lay_out",
    "seal_records",
]

CRC_BYTES = 4
STRIDE_MULTIPLE = 16
_CODED_BLOCKS = 16


@dataclass(frozen=True)
class Plane:
    """One layer within a record: its codec and byte range."""

    layer: int
    codec: Codec
    offset: int
    length: int


@dataclass(frozen=True)
class Tier:
    """A run of slots that share one record layout.

    `first_slot`..`first_slot + num_rows` are its slots, `stride` the bytes of a record,
    `rows_per_shard` the rows of every shard file but the last. Records of a `coded` tier go
    through the entropy coder: `stride` is then the bytes that planes take before, one a symbol,
    and stored records are as long as they come out.
    """

    index: int
    first_slot: int
    num_rows: int
    stride: int
    rows_per_shard: int
    planes: tuple[Plane, ...]
    coded: bool = False

    @property
    def num_shards(self) -> int:
        """Shard files of this tier."""
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def payload_bytes(self) -> int:
        """Bytes of a record that planes occupy; zeros follow up to the CRC."""
        return sum(plane.length for plane in self.planes)

    def shard_name(self, shard: int) -> str:
        """File name under tables/ of shard `shard`, counted from 0."""
        return f"records-{self.index}-{shard + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def shard_rows(self, shard: int) -> int:
        """Rows in shard `shard`."""
        return min(self.rows_per_shard, self.num_rows - shard * self.rows_per_shard)


def lay_out(
    codecs: Sequence[tuple[int, Codec]],
    num_rows: int,
    *,
    index: int = 0,
    first_slot: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    coded: bool = False,
) -> Tier:
    """The tier that holds `num_rows` records of these (layer, codec) planes.

    A shard takes as many whole blocks of 1,024 rows as fit `max_shard_bytes`, 1 to 16,384. Where
    records are `coded`, it takes as many as fit at two bytes a symbol, 1 to 16: a writer holds
    such a shard in memory.
    """
    planes = []
    offset = 0
    for layer, codec in codecs:
        length = sum(codec.segments())
        planes.append(Plane(layer, codec, offset, length))
        offset += length
    if coded:
        blocks = max_shard_bytes // (2 * max(1, offset) * BLOCK_ROWS)
        per_shard = min(max(1, blocks), _CODED_BLOCKS) * BLOCK_ROWS
        return Tier(index, first_slot, num_rows, offset, per_shard, tuple(planes), coded=True)
    stride = -(-(offset + CRC_BYTES) // STRIDE_MULTIPLE) * STRIDE_MULTIPLE
    blocks = max_shard_bytes // (stride * BLOCK_ROWS)
    blocks = min(max(1, blocks), MAX_VOCAB_SIZE // BLOCK_ROWS)
    return Tier(index, first_slot, num_rows, stride, blocks * BLOCK_ROWS, tuple(planes))


def crc_of_records(
    records_NS: npt.NDArray[np.uint8], slots_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint32]:
    """CRC-32 (zlib's) of each record's slot, as four bytes, and the record without its last four.

    With the slot in it, a record in the place of another one is noticed.
    """
    body = records_NS.shape[1] - CRC_BYTES
    return np.fromiter(
        (
            zlib.crc32(row[:body], zlib.crc32(slot.to_bytes(4, "little")))
            for row, slot in zip(np.ascontiguousarray(records_NS), slots_N.tolist(), strict=True)
        ),
        np.uint32,
        len(records_NS),
    )


def seal_records(records_NS: npt.NDArray[np.uint8], first_slot: int) -> None:
    """Write the CRC of records first_slot, first_slot + 1 .. into their last four bytes, in place.

    Little-endian.
    """
    slots_N = np.arange(first_slot, first_slot + len(records_NS), dtype=np.int64)
    crc = crc_of_records(records_NS, slots_N).astype("<u4")
    records_NS[:, -CRC_BYTES:] = crc.view(np.uint8).reshape(-1, CRC_BYTES)


def crc_of_bytes(data: bytes | memoryview, slot: int) -> int:
    """CRC-32 of a coded record's slot, as four bytes, and its bytes."""
    return zlib.crc32(data, zlib.crc32(slot.to_bytes(4, "little")))
