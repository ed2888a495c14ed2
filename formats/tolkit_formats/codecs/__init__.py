"""The codecs of formats 1.0 and 1.1: layout and numpy decoding. See `Codec` for what one offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.codecs.bands import Bands
from tolkit_formats.codecs.base import Codec, shown, shown_name
from tolkit_formats.codecs.fourbit import FOUR_BIT_NAMES, FourBit
from tolkit_formats.codecs.int8 import Int8
from tolkit_formats.codecs.raw import Raw
from tolkit_formats.codecs.steps import Steps
from tolkit_formats.codecs.svd import Svd
from tolkit_formats.errors import BundleError, UnsupportedVersionError

__all__ = [
    "CODECS",
    "Bands",
    "Codec",
    "FourBit",
    "Int8",
    "Raw",
    "Steps",
    "Svd",
    "check_shared",
    "codec_from_json",
    "codec_label",
    "prepared",
]


def codec_from_json(params: Mapping[str, object], hidden_size: int) -> Codec:
    """The codec a manifest names, for rows of `hidden_size` values.

    Raises:
        BundleError: a parameter is missing, unknown or out of range; the message names it.
        UnsupportedVersionError: the name is not a codec of this version.
    """
    if not isinstance(params, Mapping):
        raise BundleError(f"codec: expected an object, got {shown(params)}")
    name = params.get("name")
    if not isinstance(name, str):
        raise BundleError(f"codec, name: expected a string, got {shown(name)}")
    if name not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise UnsupportedVersionError(
            f"codec {shown_name(name)}: unknown to this version, expected one of {known}",
            hint="a newer tolkit may read it",
        )
    return CODECS[name](params, hidden_size)


def codec_label(codec: Codec) -> str:
    """A codec in a few characters: ``nf4``, ``rank 512 x int8``, ``f16``."""
    if isinstance(codec, Svd):
        return f"rank {codec.rank} x {codec_label(codec.inner)}"
    if isinstance(codec, Bands):
        return "bands" if codec.basis else "bands hadamard"
    if isinstance(codec, Steps):
        return "steps" if codec.basis else "steps hadamard"
    return codec.dtype if isinstance(codec, Raw) else codec.name


def prepared(codec: Codec, shared: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """A plane's shared arrays in the form `codec.decode` works with: expanded, in float32.

    Worth doing once for many calls; `decode` also takes them as stored.
    """
    if isinstance(codec, (Bands, Steps)):
        return codec.prepared(shared)
    return {name: array.astype("float32") for name, array in shared.items()}


def check_shared(codec: Codec, shared: Mapping[str, NDArray[Any]]) -> None:
    """BundleError, naming the array, when a plane's shared arrays are none an encoder writes."""
    if isinstance(codec, (Bands, Steps)):
        codec.check_shared(shared)
        return
    for name in codec.shared_shapes():
        if not np.isfinite(shared[name]).all():
            raise BundleError(f"{name}: holds NaN or infinity")


def _svd_from_json(params: Mapping[str, object], width: int) -> Codec:
    return Svd.from_json(params, width, codec_from_json)


CODECS: Mapping[str, Callable[[Mapping[str, object], int], Codec]] = {
    "raw": Raw.from_json,
    "int8": Int8.from_json,
    **{name: FourBit.from_json for name in FOUR_BIT_NAMES},
    "svd": _svd_from_json,
    "bands": Bands.from_json,
    "steps": Steps.from_json,
}
