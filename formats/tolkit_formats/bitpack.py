"""Fields of 1 to 8 bits, packed without gaps, the first one in the highest bits (SPEC section 6).

N rows, C fields a row, B bytes a row. A field never spans more than two bytes, so all of a row
are cut out of pairs of neighbouring bytes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FieldLayout", "Run", "field_widths", "pack"]

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
