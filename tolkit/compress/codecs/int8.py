"""Encoder of int8: symmetric codes, one f16 scale a row.

N rows in a batch, D values a row, B bytes of one plane in a record.
scale = absmax / 127 rounded to the nearest f16, or the next f16 up where the largest code would
leave -127..127 (only subnormal scales do); code = value / scale rounded half to even. All divisions
in float32; a row of zeros has scale 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.compress.codecs.base import empty_plane, refuse_non_finite, refuse_where, row_steps
from tolkit_formats.codecs import Int8
from tolkit_formats.codecs.int8 import MAX_CODE, SCALE_BYTES

__all__ = ["Int8Encoder"]


@dataclass(frozen=True)
class Int8Encoder:
    """Quantises row by row."""

    codec: Int8

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        plane_NB = empty_plane(self.codec, target_ND)
        codes_ND = plane_NB[:, SCALE_BYTES : SCALE_BYTES + self.codec.width].view(torch.int8)
        decoded_ND = torch.empty_like(target_ND)
        for rows in row_steps(target_ND):
            target_nD, decoded_nD = target_ND[rows], decoded_ND[rows]
            absmax_n1 = torch.abs(target_nD, out=decoded_nD).amax(dim=1, keepdim=True)
            scale_n1 = _scales(absmax_n1, target_nD, rows.start)
            plane_NB[rows, :2] = scale_n1.view(torch.uint8)
            step_n1 = scale_n1.float()
            divisor_n1 = torch.where(step_n1 == 0, 1.0, step_n1)
            codes_ND[rows] = torch.div(target_nD, divisor_n1, out=decoded_nD).round_()
            decoded_nD.copy_(codes_ND[rows]).mul_(step_n1)
        return plane_NB, decoded_ND


def _scales(absmax_n1: Tensor, target_nD: Tensor, row_offset: int) -> Tensor:
    """The f16 scales [n, 1] of rows whose largest magnitudes are float32 [n, 1]."""
    ideal_n1 = absmax_n1 / MAX_CODE
    scale_n1 = ideal_n1.half()
    if not bool(torch.isfinite(scale_n1).all()):
        refuse_non_finite(target_nD, row_offset)
        bad_nD = torch.isinf(scale_n1) & (target_nD.abs() == absmax_n1)
        refuse_where(bad_nD, target_nD, row_offset, "expected |value| / 127 that fits f16")
    # absmax > 0 with scale 0 gives infinity here and is rounded up as well.
    overflows_n1 = (absmax_n1 / scale_n1.float()).round() > MAX_CODE
    bumped_n1 = (scale_n1.view(torch.int16) + overflows_n1).view(torch.float16)
    return bumped_n1
