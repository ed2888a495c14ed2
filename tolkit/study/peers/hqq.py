"""HQQ: half-quadratic quantisation, scale and zero point in 16 bits a group of 64 of a row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tolkit.study.peers.base import Stored, in_blocks, no_multiple, quiet_import, tensor_bytes

__all__ = ["HqqPeer"]

_GROUP = 64
_ROWS_A_PACK = 4  # codes of two or four groups share a byte; it packs no smaller number


@dataclass(frozen=True)
class HqqPeer:
    """Quantizer.quantize along rows, its optimiser on."""

    name: str
    bits: int
    package: str = "hqq"

    def misfit(self, width: int) -> str | None:
        """Groups end with a row."""
        return no_multiple(width, _GROUP)

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """See Peer. Codes count as the library packs them: three bits ten to an int32.

        Each block of rows is a matrix of its own to the optimiser, which stops by its mean error.
        """
        return in_blocks(plane_VD, self._store)

    def _store(self, plane_VD: Tensor) -> Stored:
        with quiet_import():
            from hqq.core.quantize import Quantizer

        rows = len(plane_VD)
        padded_VD = nn.functional.pad(plane_VD, (0, 0, 0, -rows % _ROWS_A_PACK))
        packed, found = Quantizer.quantize(
            padded_VD, nbits=self.bits, group_size=_GROUP, axis=1, device="cpu"
        )
        # Scales are float32 until the library moves a layer to where it runs.
        packed, found = Quantizer.cpu(packed, found)
        decoded_VD = Quantizer.dequantize(packed, found)[:rows].float()
        return Stored(decoded_VD, tensor_bytes(packed, found["scale"], found["zero"]))
