"""GGUF block formats, as far as the `gguf` package writes them.

It reads the K and IQ formats but quantises none of them; those need llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.study.peers.base import Stored, in_blocks, no_multiple

__all__ = ["READ_ONLY", "GgufPeer"]

READ_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_BLOCK = 32


@dataclass(frozen=True)
class GgufPeer:
    """One block format of 32 values and their scale.

    kind: its name in `gguf.GGMLQuantizationType`.
    """

    name: str
    kind: str
    package: str = "gguf"

    def misfit(self, width: int) -> str | None:
        """Blocks end with a row."""
        return no_multiple(width, _BLOCK)

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """See Peer."""
        return in_blocks(plane_VD, self._store)

    def _store(self, plane_VD: Tensor) -> Stored:
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        packed = gguf.quants.quantize(plane_VD.numpy(), kind)
        decoded_VD = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        return Stored(decoded_VD, packed.nbytes)
