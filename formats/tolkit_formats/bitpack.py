"""Fields of 1 to 8 bits, packed without gaps, the first one in the highest bits (SPEC section 6).

N rows, C fields a row, B bytes a row. A field never spans more than two bytes, so all of a row
are cut out of pairs of neighbouring bytes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.errors import BundleError

__all__ = ["FieldLayout", "Run", "SignedRows", "field_widths", "pack"]

Run = tuple[int, int]
"""(count, bits): so many neighbouring fields of one width."""


def field_widths(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Bits of every field of `runs`, those of no bits included: int64 [C]."""
    counts, bits = zip(*runs, strict=True) if runs else ((), ())
    return np.repeat(np.array(bits, np.int64), np.array(counts, np.int64))


class FieldLayout:
    """Where the fields of a row lie.

    Args:
        widths_C: bits of each field, 1 to 8.

    Attributes:
        size_bytes: B, bytes a row takes.
    """

    def __init__(self, widths_C: NDArray[np.int64]) -> None:
        ends_C = np.cumsum(widths_C)
        total = int(ends_C[-1]) if len(ends_C) else 0
        starts_C = ends_C - widths_C
        self.size_bytes = -(-total // 8)
        self.spare_bits = 8 * self.size_bytes - total
        self.first_C = starts_C >> 3
        # A field that ends with its row's last byte needs no second one; any will do.
        self.second_C = np.minimum(self.first_C + 1, max(self.size_bytes - 1, 0))
        self.shift_C = (16 - (starts_C & 7) - widths_C).astype(np.uint16)
        self.mask_C = ((1 << widths_C) - 1).astype(np.uint16)

    def unpack(self, packed_NB: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Fields [N, C] of packed rows [N, B]."""
        pairs_NC = np.take(packed_NB, self.first_C, axis=1).astype(np.uint16)
        pairs_NC <<= np.uint16(8)
        pairs_NC |= np.take(packed_NB, self.second_C, axis=1)
        pairs_NC >>= self.shift_C
        pairs_NC &= self.mask_C
        return pairs_NC


def pack(fields_NC: NDArray[np.uint8], widths_C: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Fields [N, C] of `widths_C` bits as bytes [N, B], the last bits zero."""
    ends_C = np.cumsum(widths_C)
    total = int(ends_C[-1]) if len(ends_C) else 0
    owner = np.repeat(np.arange(len(widths_C)), widths_C)
    place = np.repeat(ends_C, widths_C) - 1 - np.arange(total)
    bits_NT = (fields_NC[:, owner] >> place.astype(np.uint8)) & np.uint8(1)
    return np.packbits(bits_NT, axis=1)


@dataclass(frozen=True)
class SignedRows:
    """Numbers -m..m with m = 2^(bits-1) - 1, kept as fields m higher; every row starts a byte."""

    count: int
    width: int
    bits: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return self.count * -(-self.bits * self.width // 8)

    def unpack(self, packed_B: NDArray[np.uint8], what: str) -> NDArray[np.float32]:
        """The numbers, float32 [count, width]; BundleError names a field no encoder writes."""
        layout = FieldLayout(np.full(self.width, self.bits, np.int64))
        fields = layout.unpack(packed_B.reshape(self.count, -1))
        largest = (1 << self.bits) - 2
        if fields.size and fields.max() > largest:
            raise BundleError(f"{what}: code {int(fields.max())} is outside 0..{largest}")
        numbers: NDArray[np.float32] = fields.astype(np.float32)
        numbers -= np.float32(largest // 2)
        return numbers

    def check(self, packed_B: NDArray[np.uint8], what: str) -> None:
        """BundleError when a bit behind the last field of a row is set."""
        spare_bits = -self.bits * self.width % 8
        last_bytes = packed_B.reshape(self.count, -1)[:, -1]
        rows = np.flatnonzero(last_bytes & np.uint8((1 << spare_bits) - 1))
        if len(rows):
            raise BundleError(f"row {int(rows[0])}, {what}: padding is not zero")
