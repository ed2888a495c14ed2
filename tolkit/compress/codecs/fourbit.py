"""Encoder of int4, nf4 and fp4.

N rows in a batch, n rows in a step, D values a row, J groups a row, G values a group,
P = J * G values of a row padded to whole groups, B bytes of one plane in a record.

The arithmetic that decides a code is in the format's module. Here a code is first a rank (its place
among the codebook's values) because ranks are counted with whole-array float32 comparisons, several
times faster than a search per value; two ranks make a byte, and a byte looks up both the stored
byte and the two decoded values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tolkit.compress.codecs.base import empty_plane, refuse_non_finite, row_steps
from tolkit_formats.codecs import FourBit
from tolkit_formats.codecs.fourbit import (
    CODE_ORDER,
    CODEBOOKS,
    DECISION_BOUNDS,
    INT4_LEVELS,
    INT4_ZERO,
    MIN_ABSMAX,
)

__all__ = ["FourBitEncoder"]


@dataclass(frozen=True)
class FourBitEncoder:
    """Quantises group by group."""

    codec: FourBit

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        codec = self.codec
        scale_bytes, _ = codec.segments()
        code_bytes = (codec.width + 1) // 2
        order = torch.tensor(CODE_ORDER[codec.name], device=target_ND.device)
        byte_of_ranks, values_of_ranks = _rank_tables(codec.name, order)

        plane_NB = empty_plane(codec, target_ND)
        decoded_ND = torch.empty_like(target_ND)
        for rows in row_steps(target_ND):
            target_nP = self._padded(target_ND[rows])
            target_nJG = target_nP.view(-1, codec.num_groups, codec.group_size)
            scratch_nJG = torch.abs(target_nJG)
            absmax_nJ = scratch_nJG.amax(dim=2)
            if not bool(torch.isfinite(absmax_nJ).all()):
                refuse_non_finite(target_ND[rows], rows.start)
            inverse_nJ = 1.0 / absmax_nJ.clamp(min=float(MIN_ABSMAX))
            torch.mul(target_nJG, inverse_nJ[:, :, None], out=scratch_nJG)
            pairs_nH = _pair_ranks(self._ranks(scratch_nJG)).view(len(target_nP), -1)

            bytes_nH = _look_up(byte_of_ranks, pairs_nH)[:, :code_bytes]
            if codec.width % 2:
                bytes_nH[:, -1] &= 0xF0
            plane_NB[rows, :scale_bytes] = absmax_nJ.view(torch.uint8)
            plane_NB[rows, scale_bytes : scale_bytes + code_bytes] = bytes_nH

            values_nJG = _look_up(values_of_ranks, pairs_nH).view(torch.float32)
            values_nJG = values_nJG.view(target_nJG.shape)
            values_nJG *= absmax_nJ[:, :, None]
            decoded_ND[rows] = values_nJG.flatten(1)[:, : codec.width]
        return plane_NB, decoded_ND

    def _padded(self, target_nD: Tensor) -> Tensor:
        """float32 [n, P]: the rows zero-padded to whole groups."""
        padding = self.codec.num_groups * self.codec.group_size - self.codec.width
        return torch.nn.functional.pad(target_nD, (0, padding)) if padding else target_nD

    def _ranks(self, scaled: Tensor) -> Tensor:
        """int8 ranks of float32 values scaled to -1..1; `scaled` may be overwritten."""
        if self.codec.name == "int4":
            return scaled.mul_(INT4_LEVELS).round_().add_(INT4_ZERO).to(torch.int8)
        count, reached = torch.zeros_like(scaled), torch.empty_like(scaled)
        for bound in DECISION_BOUNDS[self.codec.name].tolist():
            count += torch.ge(scaled, bound, out=reached)
        return count.to(torch.int8)


def _pair_ranks(ranks: Tensor) -> Tensor:
    """int32, half as many: 16 * first + second of every two neighbouring int8 ranks."""
    both = ranks.flatten().view(torch.int16)
    return ((both << 4) | (both >> 8)).to(torch.int32) & 0xFF


def _rank_tables(name: str, order: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair of ranks the stored byte, uint8 [256], and its two values, float64 [256].

    The two float32 values share the eight bytes of a float64, so that one look-up yields both.
    """
    pair = torch.arange(256, device=order.device)
    first, second = order[pair >> 4], order[pair & 15]
    codebook = torch.from_numpy(np.array(CODEBOOKS[name])).to(order.device)
    values = torch.stack([codebook[first], codebook[second]], dim=1)
    return (16 * first + second).to(torch.uint8), values.view(torch.float64)[:, 0].contiguous()


def _look_up(table: Tensor, index_nH: Tensor) -> Tensor:
    """table[index] for an int32 index, by the one indexing routine that is fast on a CPU."""
    return table.index_select(0, index_nH.flatten()).view(index_nH.shape)
