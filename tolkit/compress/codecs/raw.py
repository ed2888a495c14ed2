"""Encoder of raw: one cast.

N rows in a batch, D values a row, B bytes of one plane in a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.compress.codecs.base import empty_plane, refuse_where
from tolkit_formats.codecs import Raw

__all__ = ["RawEncoder"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RawEncoder:
    """Rounds to the nearest number of the stored dtype, ties to even."""

    codec: Raw

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        dtype = _DTYPES[self.codec.dtype]
        stored_ND = target_ND.to(dtype)
        decoded_ND = stored_ND.to(torch.float32, copy=True)
        largest = torch.finfo(dtype).max
        if not bool(torch.isfinite(decoded_ND).all()) or (
            self.codec.dtype == "f16" and bool((target_ND.abs() > largest).any())
        ):
            bad_ND = ~torch.isfinite(decoded_ND) | (target_ND.abs() > largest)
            refuse_where(bad_ND, target_ND, 0, f"expected a value that fits {self.codec.dtype}")
        plane_NB = empty_plane(self.codec, target_ND)
        payload_NB = stored_ND.contiguous().view(torch.uint8)
        plane_NB[:, : payload_NB.shape[1]] = payload_NB
        return plane_NB, decoded_ND
