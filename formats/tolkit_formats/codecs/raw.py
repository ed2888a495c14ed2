"""raw: values as they are, in f32, f16 or bf16.

N rows in a batch, D values a row, B bytes of one plane in a record.
No scales; codes are D little-endian numbers. bf16 is the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

__all__ = ["RAW_DTYPES", "Raw", "RawDtype"]

RawDtype = Literal["f32", "f16", "bf16"]
RAW_DTYPES: tuple[RawDtype, ...] = ("f32", "f16", "bf16")
_VALUE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Raw:
    """Uncoded values; `dtype` is f32, f16 or bf16."""

    width: int
    dtype: RawDtype = "f16"

    @property
    def name(self) -> str:
        return "raw"

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> Raw:
        refuse_unknown(params, "raw", frozenset({"name", "dtype"}))
        return cls(width, read_choice(params, "dtype", "raw", RAW_DTYPES))

    def to_json(self) -> dict[str, object]:
        return {"name": "raw", "dtype": self.dtype}

    def segments(self) -> tuple[int, int]:
        return 0, padded_bytes(self._payload_bytes())

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {}

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        payload_NB = plane_NB[:, : self._payload_bytes()]
        if self.dtype == "f32":
            return np.array(payload_NB.view("<f4"), dtype=np.float32, order="C")
        if self.dtype == "f16":
            return payload_NB.view("<f2").astype(np.float32, order="C")
        bits_ND = payload_NB.view("<u2").astype(np.uint32, order="C")
        bits_ND <<= 16
        return bits_ND.view(np.float32)

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        finite_ND = np.isfinite(self.decode(plane_NB, {}))
        row = first_row(~finite_ND)
        if row is not None:
            column = int(finite_ND[row].argmin())
            raise BundleError(f"row {row}, column {column}: raw value is not finite")
        require_zero_padding(plane_NB[:, self._payload_bytes() :], "raw values")

    def _payload_bytes(self) -> int:
        return self.width * _VALUE_BYTES[self.dtype]
