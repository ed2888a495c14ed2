"""bitsandbytes: four bits with one absmax a group of 64, and eight bits in blocks.

Matrices are quantised flattened: rows that are no multiple of the group come out wrong otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tolkit.study.peers.base import Stored, quiet_import, tensor_bytes

__all__ = ["BlockwiseInt8", "FourBitPeer"]

_GROUP = 64
_BLOCK = 256


@dataclass(frozen=True)
class FourBitPeer:
    """quantize_4bit, groups of 64.

    kind: nf4 or fp4.     double: the absmax values are quantised too, to 8 bits in blocks of 256.
    """

    name: str
    kind: str
    double: bool = False
    package: str = "bitsandbytes"

    def misfit(self, width: int) -> str | None:
        """Any width: groups run over the flattened matrix."""
        return None

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """See Peer. The codebooks count once a matrix, as saved files hold them."""
        bnb = _library()
        packed, state = bnb.quantize_4bit(
            plane_VD.flatten(),
            blocksize=_GROUP,
            quant_type=self.kind,
            compress_statistics=self.double,
        )
        decoded_VD = bnb.dequantize_4bit(packed, state).view(plane_VD.shape)
        rows, shared = [packed, state.absmax], [state.code]
        if state.nested:
            rows.append(state.state2.absmax)
            shared += [state.offset, state.state2.code]
        return Stored(decoded_VD.float(), tensor_bytes(*rows), tensor_bytes(*shared))


@dataclass(frozen=True)
class BlockwiseInt8:
    """quantize_blockwise, 8 bits of a dynamic codebook and one absmax a block of 256."""

    name: str
    package: str = "bitsandbytes"

    def misfit(self, width: int) -> str | None:
        """Any width: blocks run over the flattened matrix."""
        return None

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """See Peer."""
        bnb = _library()
        codes, state = bnb.quantize_blockwise(plane_VD.flatten(), blocksize=_BLOCK)
        decoded_VD = bnb.dequantize_blockwise(codes, state).view(plane_VD.shape)
        return Stored(
            decoded_VD.float(), tensor_bytes(codes, state.absmax), tensor_bytes(state.code)
        )


def _library() -> Any:
    with quiet_import():
        import bitsandbytes.functional as bnb

    return bnb
