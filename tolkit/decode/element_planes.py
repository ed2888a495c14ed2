"""Planes whose values are stored one by one (raw, int8, int4, nf4, fp4), decoded on the device.

n rows asked for, P planes of equal layout, B bytes of one plane in a record, W values of a plane,
J groups of a plane, H bytes of its four-bit codes. The products are those of the numpy codecs in
the same order, so values are equal bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tolkit_formats.codecs import Codec, FourBit, Int8, Raw
from tolkit_formats.codecs.fourbit import CODEBOOKS
from tolkit_formats.codecs.int8 import SCALE_BYTES

__all__ = ["ElementDecoder", "element_decoder"]

_RAW_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_F16_BYTES = 2


class ElementDecoder(Protocol):
    """Values of stored planes."""

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        """U8 [n, P, B], segments four-byte aligned in memory, to float32 [n, P, W]."""


def element_decoder(codec: Codec, device: torch.device) -> ElementDecoder:
    """The decoder of a codec without shared arrays; its tables lie on `device`."""
    if isinstance(codec, Raw):
        return _RawDecoder(codec)
    if isinstance(codec, Int8):
        return _Int8Decoder(codec)
    assert isinstance(codec, FourBit), f"codec {codec.name} stores no values one by one"
    return _FourBitDecoder(codec, device)


class _RawDecoder:
    def __init__(self, codec: Raw) -> None:
        self._dtype = _RAW_DTYPES[codec.dtype]
        self._size_bytes = codec.width * self._dtype.itemsize

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        return planes_nPB[..., : self._size_bytes].view(self._dtype).float()


class _Int8Decoder:
    def __init__(self, codec: Int8) -> None:
        self._stop = SCALE_BYTES + codec.width

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        scale_nP1 = planes_nPB[..., :_F16_BYTES].view(torch.float16).float()
        values_nPW = planes_nPB[..., SCALE_BYTES : self._stop].view(torch.int8).float()
        return values_nPW.mul_(scale_nP1)


class _FourBitDecoder:
    def __init__(self, codec: FourBit, device: torch.device) -> None:
        self._codec = codec
        codebook = torch.from_numpy(CODEBOOKS[codec.name])
        code = torch.arange(256)
        pairs = torch.stack([codebook[code >> 4], codebook[code & 15]], dim=1)
        # One eight-byte look-up gives the two values of a byte; nothing is computed in float64.
        self._pair_of_byte = pairs.to(device).view(torch.float64).reshape(256)

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        codec = self._codec
        groups, size, width = codec.num_groups, codec.group_size, codec.width
        absmax_nPJ = planes_nPB[..., : 4 * groups].view(torch.float32)
        packed_nPH = planes_nPB[..., 4 * groups : 4 * groups + (width + 1) // 2]
        n, planes, pairs = packed_nPH.shape
        looked_up = self._pair_of_byte.index_select(0, packed_nPH.reshape(-1).int())
        values_nPW = looked_up.view(torch.float32).view(n, planes, 2 * pairs)[..., :width]
        full = width // size
        whole_nPJG = values_nPW[..., : full * size].view(n, planes, full, size)
        whole_nPJG.mul_(absmax_nPJ[..., :full, None])
        if full < groups:
            values_nPW[..., full * size :].mul_(absmax_nPJ[..., full:])
        return values_nPW
