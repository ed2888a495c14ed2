"""int4, nf4, fp4: a sixteen-entry codebook and one f32 absmax a group.

N rows in a batch, D values a row, G values a group, B bytes of one plane in a record.
A row is cut into groups of G values, the last one may be short; groups never cross a row.
Scales: ceil(D / G) float32, the largest magnitude of each group. Codes: two a byte, the first
value in the high nibble, the low nibble of an odd tail zero, zero-padded.
value = codebook[code] * absmax, in float32.

What decides a code, all in float32: scaled = value * (1 / max(absmax, 1e-38)), each operation
rounded to nearest. int4: scaled * 7 rounded half to even, plus 8. nf4 and fp4: the entry of
`CODE_ORDER` whose index is the number of `DECISION_BOUNDS` that are <= scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.codecs.base import (
    first_row,
    padded_bytes,
    read_choice,
    refuse_unknown,
    require_zero_padding,
)
from tolkit_formats.errors import BundleError

__all__ = [
    "CODEBOOKS",
    "CODE_ORDER",
    "DECISION_BOUNDS",
    "DEFAULT_GROUP_SIZE",
    "FOUR_BIT_NAMES",
    "GROUP_SIZES",
    "INT4_LEVELS",
    "INT4_ZERO",
    "MIN_ABSMAX",
    "FourBit",
    "FourBitName",
]

FourBitName = Literal["int4", "nf4", "fp4"]
FOUR_BIT_NAMES: tuple[FourBitName, ...] = ("int4", "nf4", "fp4")
GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_GROUP_SIZE = 64
INT4_LEVELS = 7
INT4_ZERO = 8
MIN_ABSMAX = np.float32(1e-38)


def _float32(hex_digits: str) -> NDArray[np.float32]:
    return np.array([float.fromhex(word) for word in hex_digits.split()], dtype=np.float32)


# Code 0 of int4 (-8) is never written; it would stand for -8/7 and `check` refuses it.
CODEBOOKS: Mapping[str, NDArray[np.float32]] = {
    "int4": (np.arange(16, dtype=np.float32) - np.float32(INT4_ZERO)) / np.float32(INT4_LEVELS),
    "nf4": _float32(
        "-0x1p+0        -0x1.647362p-1 -0x1.0cd660p-1 -0x1.946540p-2"
        " -0x1.23449ap-2 -0x1.7a6a7ep-3 -0x1.74f0e2p-4 0x0p+0"
        " 0x1.45f5fep-4  0x1.4995c6p-3  0x1.f809bap-3  0x1.5a0674p-2"
        " 0x1.c34970p-2  0x1.200f56p-1  0x1.722766p-1  0x1p+0"
    ),
    "fp4": _float32(
        "0x0p+0          0x1.555556p-8  0x1.555556p-1  0x1p+0"
        " 0x1.555556p-2  0x1p-1         0x1.555556p-3  0x1p-2"
        " 0x0p+0        -0x1.555556p-8 -0x1.555556p-1 -0x1p+0"
        " -0x1.555556p-2 -0x1p-1       -0x1.555556p-3 -0x1p-2"
    ),
}

# Codes by rising value, and the smallest float32 at which each next one of them is chosen.
# fp4 has zero twice: code 0 for zero and the negative side, code 8 for the positive.
CODE_ORDER: Mapping[str, tuple[int, ...]] = {
    "int4": tuple(range(16)),
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
DECISION_BOUNDS: Mapping[str, NDArray[np.float32]] = {
    "nf4": _float32(
        "-0x1.b239aep-1 -0x1.38a4dep-1 -0x1.d708fep-2 -0x1.5bd4eap-2"
        " -0x1.e079d6p-3 -0x1.1a7176p-3 -0x1.74f0e0p-5 0x1.45f600p-5"
        " 0x1.ec90c6p-4  0x1.a0cfc2p-3  0x1.2b05aap-2  0x1.8ea7f4p-2"
        " 0x1.00da0ap-1  0x1.491b60p-1  0x1.b913b6p-1"
    ),
    "fp4": _float32(
        "-0x1.aaaaaap-1 -0x1.2aaaaap-1 -0x1.aaaaaap-2 -0x1.2aaaaap-2"
        " -0x1.aaaaaap-3 -0x1.5ffffep-4 -0x1.555554p-9 0x1p-149"
        " 0x1.555558p-9  0x1.600002p-4  0x1.aaaaaep-3  0x1.2aaaaep-2"
        " 0x1.aaaaaep-2  0x1.2aaaaep-1  0x1.aaaaaep-1"
    ),
}


def _byte_values(codebook: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The two values of every byte, as the eight bytes they fill in memory: uint64 [256]."""
    byte_values = np.arange(256)
    pairs = np.stack([codebook[byte_values >> 4], codebook[byte_values & 15]], axis=1)
    return np.ascontiguousarray(pairs).view(np.uint64)[:, 0]


_BYTE_VALUES = {name: _byte_values(codebook) for name, codebook in CODEBOOKS.items()}


@cache
def _word_values(name: str) -> NDArray[np.complex128]:
    """The four values of every two bytes, as the sixteen bytes they fill: complex128 [65536].

    numpy looks these up at 10 times the rate of bytes one by one; the type only carries bits.
    """
    byte_values = np.arange(1 << 16).astype(np.uint16).view(np.uint8)  # in the order of memory
    return _BYTE_VALUES[name][byte_values].view(np.complex128)


def _looked_up(name: str, packed_NH: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codebook values float32 [N, 2 x H] of packed codes."""
    if packed_NH.shape[1] % 2:
        return _BYTE_VALUES[name][packed_NH].view(np.float32)
    words_NH = np.ascontiguousarray(packed_NH).view(np.uint16)
    return _word_values(name).take(words_NH).view(np.float32)


@dataclass(frozen=True)
class FourBit:
    """One of int4, nf4 and fp4 with groups of `group_size` values."""

    name: FourBitName
    width: int
    group_size: int = DEFAULT_GROUP_SIZE

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> FourBit:
        name = read_choice(params, "name", "four-bit", FOUR_BIT_NAMES)
        refuse_unknown(params, name, frozenset({"name", "group_size"}))
        return cls(name, width, read_choice(params, "group_size", name, GROUP_SIZES))

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "group_size": self.group_size}

    def segments(self) -> tuple[int, int]:
        return 4 * self.num_groups, padded_bytes(self._code_bytes())

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {}

    @property
    def num_groups(self) -> int:
        """Groups a row, the short last one included."""
        return -(-self.width // self.group_size)

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        absmax_NJ = self._absmax(plane_NB)
        rows_ND = _looked_up(self.name, self._packed(plane_NB))[:, : self.width]
        if self.width % 2:
            rows_ND = np.ascontiguousarray(rows_ND)
        full = self.width // self.group_size
        split = full * self.group_size
        grouped_NJG = rows_ND[:, :split].reshape(len(rows_ND), full, self.group_size)
        np.multiply(grouped_NJG, absmax_NJ[:, :full, None], out=grouped_NJG)
        if split < self.width:
            rows_ND[:, split:] *= absmax_NJ[:, full:]
        return rows_ND

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        absmax_NJ = self._absmax(plane_NB)
        row = first_row(~np.isfinite(absmax_NJ) | np.signbit(absmax_NJ))
        if row is not None:
            raise BundleError(f"row {row}, {self.name} absmax: expected finite numbers >= 0")
        packed_NH = self._packed(plane_NB)
        if self.width % 2:
            require_zero_padding(packed_NH[:, -1:] & np.uint8(15), f"{self.name} codes")
        if self.name == "int4":
            zero_high_NH = packed_NH >> 4 == 0
            zero_low_NH = packed_NH & 15 == 0
            if self.width % 2:
                zero_low_NH[:, -1] = False
            row = first_row(zero_high_NH | zero_low_NH)
            if row is not None:
                raise BundleError(f"row {row}, int4 codes: code 0 is outside 1..15")
        padding_start = 4 * self.num_groups + self._code_bytes()
        require_zero_padding(plane_NB[:, padding_start:], f"{self.name} codes")

    def _code_bytes(self) -> int:
        return (self.width + 1) // 2

    def _absmax(self, plane_NB: NDArray[np.uint8]) -> NDArray[np.float32]:
        return plane_NB[:, : 4 * self.num_groups].view("<f4")

    def _packed(self, plane_NB: NDArray[np.uint8]) -> NDArray[np.uint8]:
        start = 4 * self.num_groups
        return plane_NB[:, start : start + self._code_bytes()]
