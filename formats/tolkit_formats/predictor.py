"""A plane's linear prediction from the token's embedding, added to what its codec decodes.

N rows in a batch, D values a row.
A token's row is a function of its embedding, which every device that runs the model holds anyway;
the part of it that is linear need not be stored a row.

    prediction = (unit @ weights^T) * 2^exponent,  unit = embedding / sqrt(mean(embedding^2))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.bitpack import SignedRows
from tolkit_formats.codecs.base import read_integer, refuse_unknown, require_bounded, require_scales
from tolkit_formats.codecs.expansion import MAX_EXPONENT, MAX_WIDTH

__all__ = ["Predictor", "unit_rows"]


@dataclass(frozen=True)
class Predictor:
    """Weights of `bits` bits, one f16 scale an output value."""

    width: int
    bits: int
    exponent: int = 0

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> Predictor:
        """Read from the manifest; BundleError names a wrong parameter."""
        refuse_unknown(params, "predictor", frozenset({"bits", "exponent"}))
        return cls(
            width,
            read_integer(params, "bits", "predictor", 2, MAX_WIDTH),
            read_integer(params, "exponent", "predictor", -MAX_EXPONENT, MAX_EXPONENT),
        )

    def to_json(self) -> dict[str, object]:
        """The manifest parameters."""
        return {"bits": self.bits, "exponent": self.exponent}

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """As `Codec.shared_shapes`."""
        return {
            "predictor": ("U8", (self._rows.size_bytes,)),
            "predictor_scales": ("F16", (self.width,)),
        }

    def weights_DD(self, shared: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """float32 [D out, D in]; BundleError for a code no encoder writes."""
        weights_DD = self.numbers_DD(shared)
        weights_DD *= np.asarray(shared["predictor_scales"], np.float32)[:, None]
        weights_DD *= np.float32(2.0**self.exponent)
        return weights_DD

    def numbers_DD(self, shared: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The same before scales and exponent, whole numbers -127..127."""
        return self._rows.unpack(np.asarray(shared["predictor"]), "predictor")

    def check_shared(self, shared: Mapping[str, NDArray[Any]]) -> None:
        """BundleError for arrays no encoder writes."""
        require_scales(shared["predictor_scales"], "predictor_scales")
        self._rows.check(np.asarray(shared["predictor"]), "predictor")
        # A unit embedding has the norm sqrt(D), so a row of weights gives at most:
        weights_DD = self._rows.unpack(np.asarray(shared["predictor"]), "predictor")
        scales_D = np.asarray(shared["predictor_scales"], np.float64)
        largest = float((np.linalg.norm(weights_DD, axis=1) * scales_D).max())
        require_bounded(largest * self.width**0.5 * 2.0**self.exponent, "predictor")

    @property
    def _rows(self) -> SignedRows:
        return SignedRows(self.width, self.width, self.bits)


def unit_rows(embedded_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embedding rows scaled to a root mean square of 1, a row of zeros left alone: [N, D]."""
    mean_N1 = np.square(embedded_ND).mean(axis=1, keepdims=True)
    unit_ND = embedded_ND / np.sqrt(np.where(mean_N1 > 0, mean_N1, np.float32(1)))
    return unit_ND.astype(np.float32, copy=False)
