"""Encoders of the format's codecs, one for each name in `tolkit_formats.codecs.CODECS`."""

from __future__ import annotations

from tolkit.compress.codecs.bands import BandsEncoder
from tolkit.compress.codecs.base import Encoder
from tolkit.compress.codecs.fourbit import FourBitEncoder
from tolkit.compress.codecs.int8 import Int8Encoder
from tolkit.compress.codecs.raw import RawEncoder
from tolkit.compress.codecs.steps import StepsEncoder
from tolkit.compress.codecs.svd import SvdEncoder
from tolkit_formats.codecs import Bands, Codec, FourBit, Int8, Raw, Steps, Svd

__all__ = ["Encoder", "encoder_for"]


def encoder_for(codec: Codec) -> Encoder:
    """The encoder that writes `codec`'s bytes."""
    if isinstance(codec, Raw):
        return RawEncoder(codec)
    if isinstance(codec, Int8):
        return Int8Encoder(codec)
    if isinstance(codec, FourBit):
        return FourBitEncoder(codec)
    if isinstance(codec, Bands):
        return BandsEncoder(codec)
    if isinstance(codec, Steps):
        return StepsEncoder(codec)
    assert isinstance(codec, Svd), f"no encoder for {codec}"
    return SvdEncoder(codec, encoder_for(codec.inner))
