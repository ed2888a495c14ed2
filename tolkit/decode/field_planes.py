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
from tolkit_formats.rans_models import MAX_SYMBOLS

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
        places_nC = self.places(records_nS, part, start=start)
        values_nC = self.books.index_select(0, places_nC.view(-1)).view(places_nC.shape)
        return values_nC.mul_(self.scales_C[part])

    def places(self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0) -> Tensor:
        """Where in `books` each coefficient's value is, int32 [n, C]; as `coefficients`."""
        fields_nC = records_nS.index_select(1, self.first_C[part] - start).int()
        fields_nC = fields_nC.bitwise_left_shift_(8)
        fields_nC |= records_nS.index_select(1, self.second_C[part] - start)
        fields_nC.bitwise_right_shift_(self.shift_C[part]).bitwise_and_(self.mask_C[part])
        fields_nC += self.start_C[part]
        return fields_nC


class StepsFields:
    """Coefficients of all planes of codec steps of a tier, from symbols of a byte each.

    Args:
        planes: (codec, shared arrays of the layer and the coder's as stored, offset) of each.
    """

    def __init__(self, planes: Sequence[tuple[Steps, Shared, int]], device: torch.device) -> None:
        self.counts: tuple[int, ...] = tuple(codec.count for codec, _, _ in planes)
        drawn = [_symbols(*plane) for plane in planes if plane[0].count]
        levels = np.zeros(0, np.float32)
        if drawn:
            # All planes have the same levels; a coefficient of one symbol takes 0 for its second.
            levels = np.concatenate([drawn[0].levels, np.zeros(MAX_SYMBOLS, np.float32)])
            nothing = len(drawn[0].levels)
            seconds = [np.where(each.fine > 0, each.second_first, nothing) for each in drawn]
            self.second_first_C = _joined(seconds, np.int32, device)
        self.place_C = _joined([each.place for each in drawn], np.int64, device)
        self.first_C = _joined([each.first for each in drawn], np.int32, device)
        self.steps_C = _joined([each.step for each in drawn], np.float32, device)
        self.second_C = _joined([each.second for each in drawn], np.int64, device)
        self.factor_C = _joined([2.0**each.fine for each in drawn], np.float32, device)
        self._is_fine = any(each.fine.any() for each in drawn)
        self.levels = torch.from_numpy(levels).to(device)

    def in_steps(self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0) -> Tensor:
        """Levels, float32 [n, C], of symbol planes U8 [n, S]; arguments as `coefficients`."""
        values_nC = self._looked_up(records_nS, self.place_C[part] - start, self.first_C[part])
        if self._is_fine:
            values_nC *= self.factor_C[part]
            second_C = self.second_C[part] - start
            values_nC += self._looked_up(records_nS, second_C, self.second_first_C[part])
        return values_nC

    def _looked_up(self, records_nS: Tensor, place_C: Tensor, first_C: Tensor) -> Tensor:
        index_nC = records_nS.index_select(1, place_C).int()
        index_nC += first_C
        return self.levels.index_select(0, index_nC.view(-1)).view(index_nC.shape)

    def coefficients(
        self, records_nS: Tensor, part: slice = slice(None), *, start: int = 0
    ) -> Tensor:
        """Levels times the step: float32 [n, C]; arguments as those of `BandsFields`."""
        return self.in_steps(records_nS, part, start=start).mul_(self.steps_C[part])


@dataclass(frozen=True)
class _Symbols:
    """One plane's symbols [c]: places in the record, first levels, the step, fine bits."""

    place: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    second_first: NDArray[np.int64]
    step: NDArray[np.float32]
    fine: NDArray[np.int64]
    levels: NDArray[np.float32]


def _symbols(codec: Steps, shared: Shared, offset: int) -> _Symbols:
    # Without its basis a codec prepares the levels alone.
    ready = replace(codec, basis=()).prepared(shared)
    place = offset + np.arange(codec.count)
    two = np.flatnonzero(codec.fine_C)
    second, second_first = place.copy(), np.zeros(codec.count, np.int64)
    second[two] = offset + np.arange(codec.count, codec.num_symbols)
    second_first[two] = ready["first"][codec.count :]
    return _Symbols(
        place=place,
        first=ready["first"][: codec.count],
        second=second,
        second_first=second_first,
        step=np.full(codec.count, ready["basis"][0, 0]),
        fine=codec.fine_C,
        levels=ready["levels"],
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0), *parts]).astype(dtype)).to(device)


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
