"""Encoder of bands: coefficients by the analysis matrix, each to the nearest value of its codebook.

N rows in a batch, D values a row, C coefficients stored, B bytes of one plane in a record.
Besides the stored arrays `shared` has the analysis matrix, which is only needed to encode: for a
transform in the metric of a reader it is not the basis transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tolkit.compress.codecs.base import empty_plane, refuse_non_finite
from tolkit_formats.bitpack import pack
from tolkit_formats.codecs import Bands
from tolkit_formats.codecs.bands import hadamard_block, hadamard_size

__all__ = ["ANALYSIS", "BandsEncoder", "rotated"]

ANALYSIS = "analysis"


@dataclass(frozen=True)
class BandsEncoder:
    """Quantises coefficient by coefficient."""

    codec: Bands

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `Encoder.encode`; `shared` has float32 `mean`, `codebooks`, `scales.T`, `basis` and
        `analysis` [D, R] (neither of the two for Hadamard)."""
        codec = self.codec
        refuse_non_finite(target_ND)
        plane_NB = empty_plane(codec, target_ND)
        power = 2.0**codec.exponent
        centred_ND = torch.add(target_ND / power, shared["mean"], alpha=-1)
        decoded_ND = shared["mean"].repeat(len(target_ND), 1)
        if len(codec.stored_C):
            coeffs_NC = self._coefficients(centred_ND, shared)
            codes_NC, values_NC = self._quantised(coeffs_NC, shared)
            packed = pack(codes_NC.numpy(), codec.widths_R[codec.stored_C])
            plane_NB[:, : packed.shape[1]] = torch.from_numpy(packed)
            decoded_ND += self._expanded(values_NC, shared)
        if codec.exponent:
            decoded_ND *= power
        return plane_NB, decoded_ND

    def _coefficients(self, centred_ND: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if not self.codec.basis:
            return rotated(centred_ND)[:, self._stored_C]
        return centred_ND @ shared[ANALYSIS][:, self._stored_C]

    def _expanded(self, values_NC: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if self.codec.basis:
            return values_NC @ shared["basis"][self._stored_C]
        full_NR = values_NC.new_zeros((len(values_NC), self.codec.width))
        full_NR[:, self._stored_C] = values_NC
        return rotated(full_NR)

    def _quantised(
        self, coeffs_NC: Tensor, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, C] and the values a reader takes them for, width by width."""
        scales_C = shared[self.codec.scales_name]
        units_NC = coeffs_NC / torch.where(scales_C > 0, scales_C, 1.0)
        codes_NC = torch.empty(coeffs_NC.shape, dtype=torch.uint8)
        values_NC = torch.empty_like(coeffs_NC)
        start = 0
        for bits in self.codec.codebooks:
            book = shared["codebooks"][start : start + (1 << bits)]
            start += 1 << bits
            columns = torch.from_numpy(np.flatnonzero(self._widths_C == bits))
            if not len(columns):
                continue
            bounds = (book[1:] + book[:-1]) / 2
            codes = torch.bucketize(units_NC[:, columns].contiguous(), bounds)
            codes_NC[:, columns] = codes.to(torch.uint8)
            values_NC[:, columns] = book[codes]
        values_NC *= scales_C
        return codes_NC, values_NC

    @cached_property
    def _stored_C(self) -> Tensor:
        return torch.from_numpy(self.codec.stored_C)

    @property
    def _widths_C(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self.codec.widths_R[self.codec.stored_C]


def rotated(rows_ND: Tensor) -> Tensor:
    """Rows through the Hadamard rotation, which is its own inverse: float32 [N, D]."""
    size = hadamard_size(rows_ND.shape[1])
    block = torch.from_numpy(hadamard_block(size))
    return (rows_ND.reshape(len(rows_ND), -1, size) @ block).reshape(rows_ND.shape)
