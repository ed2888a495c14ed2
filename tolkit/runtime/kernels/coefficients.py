"""One plane's coefficients as the kernels read them, and the codecs whose values they read singly.

C coefficients of the plane, D hidden, R rows of its basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tolkit.decode.field_planes import codebook_starts
from tolkit_formats.bitpack import FieldLayout
from tolkit_formats.codecs import Bands, Codec, FourBit, Int8, Raw, Steps
from tolkit_formats.codecs.fourbit import CODEBOOKS
from tolkit_formats.codecs.int8 import SCALE_BYTES

__all__ = ["Coefficients", "Elements", "codes_at", "of_bands", "of_steps"]

_RAW_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Elements:
    """A codec that stores values one by one, whatever its width.

    `numbers` is the type that its scales (raw: its values) are read as.
    """

    kind: str
    numbers: torch.dtype
    group: int = 1
    name: str = ""

    @classmethod
    def of(cls, codec: Codec) -> Elements:
        """Of raw, int8, int4, nf4 or fp4."""
        if isinstance(codec, Raw):
            return cls("raw", _RAW_DTYPES[codec.dtype])
        if isinstance(codec, Int8):
            return cls("int8", torch.float16)
        assert isinstance(codec, FourBit)
        return cls("fourbit", torch.float32, codec.group_size, codec.name)

    def table(self) -> NDArray[np.float32]:
        """The codebook, one zero where there is none."""
        return CODEBOOKS[self.name] if self.name else np.zeros(1, np.float32)


def codes_at(codec: Codec) -> int:
    """Byte of a plane where the codes start."""
    if isinstance(codec, FourBit):
        return 4 * codec.num_groups
    return SCALE_BYTES if isinstance(codec, Int8) else 0


@dataclass(frozen=True)
class Coefficients:
    """One plane's part of an ExpandPlan; `row` counts the rows of its own basis at first."""

    place: NDArray[np.int64]
    field: NDArray[np.int64]
    scale: NDArray[np.float32]
    row: NDArray[np.int64]
    mean_D: NDArray[np.float32]
    table: NDArray[np.float32]
    extra: int


def of_bands(codec: Bands, stored: Mapping[str, NDArray[Any]]) -> Coefficients:
    mean_D = np.asarray(stored["mean"], np.float32)
    if not len(codec.stored_C):
        return _nothing(mean_D)
    layout = FieldLayout(codec.widths_R[codec.stored_C])
    field = layout.shift_C.astype(np.int64) | layout.mask_C.astype(np.int64) << 8
    return Coefficients(
        place=layout.first_C,
        field=field | codebook_starts(codec) << 16,
        scale=np.asarray(stored[codec.scales_name], np.float32),
        row=codec.stored_C,
        mean_D=mean_D,
        table=np.asarray(stored["codebooks"], np.float32),
        extra=0,
    )


def of_steps(codec: Steps, stored: Mapping[str, NDArray[Any]]) -> Coefficients:
    ready = replace(codec, basis=()).prepared(stored)
    if not codec.count:
        return _nothing(ready["mean"])
    # A coefficient of two symbols is two with the same row of the basis.
    two = np.flatnonzero(codec.fine_C)
    factor = np.concatenate([2.0**codec.fine_C, np.ones(len(two))]).astype(np.float32)
    return Coefficients(
        place=np.arange(codec.num_symbols),
        field=ready["first"],
        scale=factor * ready["basis"][0, 0],
        row=np.concatenate([np.arange(codec.count), two]),
        mean_D=ready["mean"],
        table=ready["levels"],
        extra=0,
    )


def _nothing(mean_D: NDArray[np.float32]) -> Coefficients:
    none, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return Coefficients(none, none, nothing, none, mean_D, nothing, 0)
