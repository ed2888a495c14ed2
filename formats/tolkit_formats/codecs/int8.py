"""int8: symmetric eight-bit codes with one f16 scale a row.

N rows in a batch, D values a row, B bytes of one plane in a record.
Scales: the f16 scale, then two zero bytes. Codes: D signed bytes in -127..127, zero-padded.
value = code * scale, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.codecs.base import (
    first_row,
    padded_bytes,
    refuse_unknown,
    require_zero_padding,
)
from tolkit_formats.errors import BundleError

__all__ = ["MAX_CODE", "SCALE_BYTES", "Int8"]

MAX_CODE = 127
SCALE_BYTES = 4
_F16_BYTES = 2


@dataclass(frozen=True)
class Int8:
    """One f16 scale a row, one signed byte a value."""

    width: int

    @property
    def name(self) -> str:
        return "int8"

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> Int8:
        refuse_unknown(params, "int8", frozenset({"name"}))
        return cls(width)

    def to_json(self) -> dict[str, object]:
        return {"name": "int8"}

    def segments(self) -> tuple[int, int]:
        return SCALE_BYTES, padded_bytes(self.width)

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {}

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        scale_N1 = plane_NB[:, :_F16_BYTES].view("<f2").astype(np.float32)
        rows_ND = self._codes(plane_NB).astype(np.float32, order="C")
        rows_ND *= scale_N1
        return rows_ND

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        scale_N1 = plane_NB[:, :_F16_BYTES].view("<f2")
        row = first_row(~np.isfinite(scale_N1) | np.signbit(scale_N1))
        if row is not None:
            scale = float(scale_N1[row, 0])
            raise BundleError(f"row {row}, int8 scale: expected a finite number >= 0, got {scale}")
        row = first_row(self._codes(plane_NB) < -MAX_CODE)
        if row is not None:
            raise BundleError(f"row {row}, int8 codes: code -128 is outside -127..127")
        require_zero_padding(plane_NB[:, _F16_BYTES:SCALE_BYTES], "int8 scale")
        require_zero_padding(plane_NB[:, SCALE_BYTES + self.width :], "int8 codes")

    def _codes(self, plane_NB: NDArray[np.uint8]) -> NDArray[np.int8]:
        return plane_NB[:, SCALE_BYTES : SCALE_BYTES + self.width].view(np.int8)
