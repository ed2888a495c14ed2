"""Planes whose values are stored one by one (raw, int8, int4, nf4, fp4), decoded on the device.

n rows asked for, P planes of equal layout, B bytes of one plane in a record, W values of a plane,
J groups of a plane, H bytes of its four-bit codes. The products are those of the numpy codecs in
the same order, so values are equal bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tolkit_formats.codecs import Codec, FourBit, Int8, Raw
from tolkit_formats.codecs.fourbit import CODEBOOKS
from tolkit_formats.codecs.int8 import SCALE_BYTES

__all__ = ["ElementDecoder", "element_decoder", "empty_rows"]

_RAW_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_F16_BYTES = 2
_CODES_AT_ONCE = 1 << 17


class ElementDecoder(Protocol):
    """Values of stored planes."""

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        """U8 [n, P, B], segments four-byte aligned in memory, to float32 [n, P, W]."""


def empty_rows(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32, values not set.

    On a CPU it is numpy's memory, which asks the system for huge pages: torch's does not, and took
    four times as long to fill a fresh array of 32 MB.
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    return torch.from_numpy(np.empty(shape, np.float32))


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
        values_nPW = planes_nPB[..., : self._size_bytes].view(self._dtype)
        if self._dtype == torch.float32:
            return values_nPW
        return empty_rows(tuple(values_nPW.shape), values_nPW.device).copy_(values_nPW)


class _Int8Decoder:
    def __init__(self, codec: Int8) -> None:
        self._stop = SCALE_BYTES + codec.width

    def __call__(self, planes_nPB: Tensor) -> Tensor:
        scale_nP1 = planes_nPB[..., :_F16_BYTES].view(torch.float16).float()
        codes_nPW = planes_nPB[..., SCALE_BYTES : self._stop].view(torch.int8)
        values_nPW = empty_rows(tuple(codes_nPW.shape), codes_nPW.device).copy_(codes_nPW)
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
        groups, width = codec.num_groups, codec.width
        absmax_nPJ = planes_nPB[..., : 4 * groups].view(torch.float32)
        packed_nPH = planes_nPB[..., 4 * groups : 4 * groups + (width + 1) // 2]
        n, planes, pairs = packed_nPH.shape
        values_nPW = empty_rows((n, planes, 2 * pairs), packed_nPH.device)
        pairs_nX = values_nPW.view(n, planes * 2 * pairs).view(torch.float64)
        at_once = n if values_nPW.is_cuda else max(1, _CODES_AT_ONCE // max(1, planes * pairs))
        for first in range(0, n, max(1, at_once)):
            part = slice(first, first + at_once)
            codes = packed_nPH[part].reshape(-1).int()
            torch.index_select(self._pair_of_byte, 0, codes, out=pairs_nX[part].view(-1))
            self._scale(values_nPW[part, :, :width], absmax_nPJ[part])
        return values_nPW[..., :width]

    def _scale(self, values_nPW: Tensor, absmax_nPJ: Tensor) -> None:
        groups, size, width = self._codec.num_groups, self._codec.group_size, self._codec.width
        full = width // size
        rows, planes = values_nPW.shape[:2]
        whole_nPJG = values_nPW[..., : full * size].view(rows, planes, full, size)
        whole_nPJG.mul_(absmax_nPJ[..., :full, None])
        if full < groups:
            values_nPW[..., full * size :].mul_(absmax_nPJ[..., full:])
