"""svd: R coefficients a row, stored by another codec, expanded in a shared f16 basis.

N rows in a batch, D values a row, R coefficients a row, B bytes of one plane in a record.
The bytes of a row are the inner codec's for width R. row = coefficients @ basis, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.codecs.base import Codec, read_integer, refuse_unknown, shown
from tolkit_formats.errors import BundleError

__all__ = ["BASIS", "Svd"]

BASIS = "basis"


@dataclass(frozen=True)
class Svd:
    """A rank-R plane: `inner` stores the coefficients (its width is the rank)."""

    width: int
    inner: Codec

    @property
    def name(self) -> str:
        return "svd"

    @property
    def rank(self) -> int:
        """R, the number of coefficients a row."""
        return self.inner.width

    @classmethod
    def from_json(
        cls,
        params: Mapping[str, object],
        width: int,
        inner_from_json: Callable[[Mapping[str, object], int], Codec],
    ) -> Svd:
        """As `Codec.from_json`; `inner_from_json` builds the codec of the coefficients."""
        refuse_unknown(params, "svd", frozenset({"name", "rank", "inner"}))
        rank = read_integer(params, "rank", "svd", 1, width)
        inner = params.get("inner")
        if not isinstance(inner, Mapping) or inner.get("name") in ("svd", "bands"):
            raise BundleError(
                "codec svd, inner: expected the parameters of a codec other than svd and bands,"
                f" got {shown(inner)}"
            )
        return cls(width, inner_from_json(inner, rank))

    def to_json(self) -> dict[str, object]:
        return {"name": "svd", "rank": self.rank, "inner": self.inner.to_json()}

    def segments(self) -> tuple[int, int]:
        return self.inner.segments()

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {BASIS: ("F16", (self.rank, self.width))}

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        """As `Codec.decode`; a basis already widened to float32 is used without a copy."""
        basis_RD = np.asarray(shared[BASIS], dtype=np.float32)
        coeffs_NR = self.inner.decode(plane_NB, {})
        rows_ND: NDArray[np.float32] = np.matmul(coeffs_NR, basis_RD)
        return rows_ND

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        self.inner.check(plane_NB)
