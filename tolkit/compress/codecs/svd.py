"""Encoder of svd: project on the basis, then encode the coefficients.

N rows in a batch, D values a row, R coefficients a row.
coefficients = target @ basis^T and decoded = decoded coefficients @ basis, both in float32 on the
f16 basis widened, so what rounding the basis loses stays visible to the caller's error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.compress.codecs.base import Encoder, refuse_non_finite
from tolkit.errors import NonFiniteError
from tolkit_formats.codecs import Svd
from tolkit_formats.codecs.svd import BASIS

__all__ = ["SvdEncoder"]


@dataclass(frozen=True)
class SvdEncoder:
    """Wraps the encoder of the coefficients."""

    codec: Svd
    inner: Encoder

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `Encoder.encode`; a basis already widened to float32 is used without a copy."""
        basis_RD = shared[BASIS].to(torch.float32)
        coeffs_NR = target_ND @ basis_RD.T
        if not bool(torch.isfinite(coeffs_NR).all()):
            refuse_non_finite(target_ND)
        try:
            plane_NB, decoded_NR = self.inner.encode(coeffs_NR, {})
        except NonFiniteError as error:
            raise NonFiniteError(f"svd coefficients: {error.message}", row=error.row) from error
        return plane_NB, decoded_NR @ basis_RD
