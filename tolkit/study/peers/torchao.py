"""torchao: an embedding with integer weights (IntxWeightOnlyConfig), scales in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tolkit.study.peers.base import Stored, no_multiple, quiet_import, tensor_bytes

__all__ = ["TorchaoPeer"]


@dataclass(frozen=True)
class TorchaoPeer:
    """quantize_ on an nn.Embedding.

    bits: of a code.     group_size: values that share a scale; None means the whole row.
    symmetric: no zero points.
    """

    name: str
    bits: int
    group_size: int | None
    symmetric: bool = True
    package: str = "torchao"

    def misfit(self, width: int) -> str | None:
        """Groups end with a row."""
        return None if self.group_size is None else no_multiple(width, self.group_size)

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """See Peer.

        Codes count with their own width: the library holds each in a byte until it packs them
        for a kernel. The zero points of symmetric codes are all 0 and do not count.
        """
        weight = self._quantised(plane_VD)
        decoded_VD = weight.dequantize().float()
        zeros = None if self.symmetric else weight.zero_point
        code_bytes = -(-weight.qdata.numel() * self.bits // 8)
        return Stored(decoded_VD, code_bytes + tensor_bytes(weight.scale, zeros))

    def _quantised(self, plane_VD: Tensor) -> Any:
        with quiet_import():
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis, PerGroup
            from torchao.quantization.quant_primitives import MappingType

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{self.bits}"),
            granularity=PerAxis(0) if self.group_size is None else PerGroup(self.group_size),
            mapping_type=MappingType.SYMMETRIC if self.symmetric else MappingType.ASYMMETRIC,
            scale_dtype=torch.float16,
        )
        rows, width = plane_VD.shape
        holder = nn.Sequential(nn.Embedding(rows, width, _weight=plane_VD, _freeze=True))
        quantize_(holder, config, lambda module, _: isinstance(module, nn.Embedding))
        return holder[0].weight
