"""Planes of coefficients (bands, steps): cut out of records, looked up and expanded on the device.

n rows asked for, S record stride, C coefficients of all planes of a group one after the other,
c those of one plane, R rows of a basis, D hidden. All coefficients of a record come from one
gather of its bytes, whatever the layers' widths are. They equal the numpy codecs' bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolkit.rotation import rotated
from tolkit_formats.bitpack import FieldLayout
from tolkit_formats.codecs import Bands, Steps

__all__ = ["BandsFields", "ExpandedPlane", "StepsFields", "codebook_starts"]

Shared = Mapping[str, NDArray[Any]]


def codebook_starts(codec: Bands) -> NDArray[np.int64]:
    """Where in the plane's codebooks each stored coefficient's own begins: int64 [c]."""
    sizes = np.array([1 << bits for bits in codec.codebooks], np.int64)
    start_of_bits = dict(zip(codec.codebooks, np.cumsum(sizes) - sizes, strict=True))
    widths = codec.widths_R[codec.stored_C].tolist()
    return np.array([start_of_bits[bits] for bits in widths], np.int64)


class BandsFields:
    """Coefficients of all planes of codec bands of a tier.

    Args:
        planes: (codec, shared arrays of the layer as stored, offset in the record) of each.
    """

    def __init__(self, planes: Sequence[tuple[Bands, Shared, int]], device: torch.device) -> None:
        parts: dict[str, list[NDArray[Any]]] = {
            name: [np.zeros(0, dtype)]
            for name, dtype in (
                ("first", np.int64), ("second", np.int64), ("shift", np.int32),
                ("mask", np.int32), ("start", np.int32), ("books", np.float32),
                ("scales", np.float32),
            )
        }  # fmt: skip
        books = 0
        self.counts: tuple[int, ...] = tuple(len(codec.stored_C) for codec, _, _ in planes)
        for codec, shared, offset in planes:
            if not len(codec.stored_C):
                continue
            layout = FieldLayout(codec.widths_R[codec.stored_C])
            parts["first"].append(layout.first_C + offset)
            parts["second"].append(layout.second_C + offset)
            parts["shift"].append(layout.shift_C)
            parts["mask"].append(layout.mask_C)
            parts["start"].append(codebook_starts(codec) + books)
            parts["books"].append(np.asarray(shared["codebooks"], np.float32))
            parts["scales"].append(np.asarray(shared[codec.scales_name], np.float32))
            books += len(parts["books"][-1])
        made = {
            name: torch.from_numpy(np.concatenate(arrays).astype(arrays[0].dtype)).to(device)
            for name, arrays in parts.items()
        }
        self.first_C, self.second_C = made["first"], made["second"]
        self.shift_C, self.mask_C, self.start_C = made["shift"], made["mask"], made["start"]
        self.books, self.scales_C = made["books"], made["scales"]

    def coefficients(
        self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0
    ) -> Tensor:
        """Float32 [n, C] of U8 [n, S].

        Args:
            part: of the C coefficients, by default all.
            start: where in a record its bytes given here begin.
        """
        fields_nC = records_nS.index_select(1, self.first_C[part] - start).int()
        fields_nC = fields_nC.bitwise_left_shift_(8)
        fields_nC |= records_nS.index_select(1, self.second_C[part] - start)
        fields_nC.bitwise_right_shift_(self.shift_C[part]).bitwise_and_(self.mask_C[part])
        fields_nC += self.start_C[part]
        values_nC = self.books.index_select(0, fields_nC.view(-1)).view(fields_nC.shape)
        return values_nC.mul_(self.scales_C[part])


class StepsFields:
    """Coefficients of all planes of codec steps of a tier, from symbols of a byte each.

    Args:
        planes: (codec, shared arrays of the layer and the coder's as stored, offset) of each.
    """

    def __init__(self, planes: Sequence[tuple[Steps, Shared, int]], device: torch.device) -> None:
        self.counts: tuple[int, ...] = tuple(codec.count for codec, _, _ in planes)
        places, firsts, steps = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0)]
        levels = np.zeros(0, np.float32)
        for codec, shared, offset in planes:
            if not codec.count:
                continue
            # Without its basis a codec prepares the levels alone; all planes have the same ones.
            ready = replace(codec, basis=()).prepared(shared)
            levels = ready["levels"]
            places.append(offset + np.arange(codec.count))
            firsts.append(ready["first"])
            steps.append(np.full(codec.count, ready["basis"][0, 0]))
        self.place_C = torch.from_numpy(np.concatenate(places)).to(device)
        self.first_C = torch.from_numpy(np.concatenate(firsts).astype(np.int32)).to(device)
        self.steps_C = torch.from_numpy(np.concatenate(steps).astype(np.float32)).to(device)
        self.levels = torch.from_numpy(levels).to(device)

    def in_steps(self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0) -> Tensor:
        """Levels, float32 [n, C], of symbol planes U8 [n, S]; arguments as `coefficients`."""
        index_nC = records_nS.index_select(1, self.place_C[part] - start).int()
        index_nC += self.first_C[part]
        return self.levels.index_select(0, index_nC.view(-1)).view(index_nC.shape)

    def coefficients(
        self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0
    ) -> Tensor:
        """Levels times the step: float32 [n, C]; arguments as those of `BandsFields`."""
        return self.in_steps(records_nS, part, start=start).mul_(self.steps_C[part])


@dataclass(frozen=True)
class ExpandedPlane:
    """How the coefficients of one plane become rows.

    Attributes:
        mean_D: float32.
        basis_cD: float32 rows of the stored coefficients, None for the Hadamard rotation.
        stored_c: int64 places of the coefficients in the rotated row; None with a basis.
    """

    mean_D: Tensor
    basis_cD: Tensor | None
    stored_c: Tensor | None
    exponent: int

    def rows(self, values_nc: Tensor) -> Tensor:
        """Float32 [n, D] of coefficients [n, c]."""
        if not values_nc.shape[1]:
            rows_nD = self.mean_D.repeat(len(values_nc), 1)
        elif self.basis_cD is not None:
            rows_nD = torch.addmm(self.mean_D, values_nc, self.basis_cD)
        else:
            assert self.stored_c is not None
            full_nD = values_nc.new_zeros(len(values_nc), len(self.mean_D))
            full_nD[:, self.stored_c] = values_nc
            rows_nD = rotated(full_nD).add_(self.mean_D)
        return rows_nD.mul_(2.0**self.exponent) if self.exponent else rows_nD
