"""The arrays that all rows of one plane share, as parameters around what the bundle stores.

n rows, D hidden, R rows of a basis, C coefficients of a tier, S record stride, m largest code.

A parameter is 0 where the bundle's own number is; what it moves is scaled so that one learning
rate serves means, scales, codebooks and codes alike: about 1 % of a number for every 0.01. What is
decoded are the values that would be stored, rounded; gradients pass through the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tolkit.compress.fill.resolve import packed_rows
from tolkit.decode.field_planes import BandsFields, StepsFields
from tolkit.rotation import rotated
from tolkit_formats.bitpack import field_widths
from tolkit_formats.codecs import Bands, Steps
from tolkit_formats.predictor import Predictor

__all__ = ["Arrays", "TunedLayer", "count_tuned"]

Arrays = Mapping[str, npt.NDArray[Any]]

_CODE_GAIN = 3.0
_FEW_CODES = 7  # m of four bits
_FEW_VALUES = 4


class _SignedRows(nn.Module):
    """Rows of codes -m..m, one scale each."""

    base_RD: Tensor
    largest_R1: Tensor
    base_scale_R: Tensor

    def __init__(
        self,
        numbers_RD: npt.NDArray[np.float32],
        bits_R: npt.NDArray[np.int64],
        scales_R: npt.NDArray[Any],
    ) -> None:
        super().__init__()
        self.bits_R = bits_R
        _keep(self, "base_RD", numbers_RD)
        _keep(self, "largest_R1", ((1 << (bits_R - 1)) - 1)[:, None])
        _keep(self, "base_scale_R", scales_R)
        self.codes = nn.Parameter(torch.zeros_like(self.base_RD))
        self.scales = nn.Parameter(torch.zeros_like(self.base_scale_R))

    def numbers_RD(self) -> Tensor:
        """Whole numbers, float32."""
        gain_R1 = _CODE_GAIN * (self.largest_R1 / _FEW_CODES).clamp(min=1.0)
        moved_RD = self.base_RD + gain_R1 * self.codes
        rounded_RD = moved_RD.round().clamp(-self.largest_R1, self.largest_R1)
        return moved_RD + (rounded_RD - moved_RD).detach()

    def scales_R(self) -> Tensor:
        return _as_f16(self.base_scale_R * self.scales.exp())

    def values_RD(self) -> Tensor:
        return self.numbers_RD() * self.scales_R()[:, None]

    def packed(self) -> npt.NDArray[np.uint8]:
        """As stored."""
        codes_RD = self.numbers_RD().detach().round().to(device="cpu", dtype=torch.int8)
        return packed_rows(codes_RD, self.bits_R)


@dataclass(frozen=True)
class _TierPart:
    """How a tier's records hold this plane: its codes, and which rows of the basis they are of."""

    fields: BandsFields | StepsFields
    basis_rows_C: Tensor


class TunedLayer(nn.Module):
    """One plane of codec bands or steps.

    Args:
        codecs: (codec, offset in the record) of every tier.
        arrays: shared ones of the layer and of all layers, as stored.
        predictor: None without.
    """

    base_mean_D: Tensor
    base_books_K: Tensor
    book_gain_K: Tensor
    base_steps_T: Tensor

    def __init__(
        self,
        codecs: Sequence[tuple[Bands | Steps, int]],
        arrays: Arrays,
        predictor: Predictor | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._codecs = [codec for codec, _ in codecs]
        first = self._codecs[0]
        self.exponent = first.exponent
        _keep(self, "base_mean_D", arrays["mean"])
        self.mean = nn.Parameter(torch.zeros_like(self.base_mean_D))
        self.basis: _SignedRows | None = None
        if first.basis:
            bits_R = field_widths(first.basis)
            numbers_RD = first.basis_numbers(arrays)
            self.basis = _SignedRows(numbers_RD, bits_R, arrays["basis_scales"])
        self.predictor: _SignedRows | None = None
        self.predictor_exponent = 0
        if predictor is not None:
            bits_D = np.full(predictor.width, predictor.bits)
            numbers_DD = predictor.numbers_DD(arrays)
            self.predictor = _SignedRows(numbers_DD, bits_D, arrays["predictor_scales"])
            self.predictor_exponent = predictor.exponent
        self.scales = nn.ParameterDict()
        self._add_coefficients(arrays)
        self._mean_unit = self._deviation()
        self._parts = [_part(codec, arrays, offset, device) for codec, offset in codecs]
        self.to(device)

    def _add_coefficients(self, arrays: Arrays) -> None:
        first = self._codecs[0]
        if isinstance(first, Steps):
            _keep(self, "base_steps_T", arrays["steps"])
            self.steps = nn.Parameter(torch.zeros_like(self.base_steps_T))
            return
        if not first.codebooks:
            return
        _keep(self, "base_books_K", arrays["codebooks"])
        self._book_sizes = [1 << bits for bits in first.codebooks]
        gains = [np.full(size, min(1.0, _FEW_VALUES / size)) for size in self._book_sizes]
        _keep(self, "book_gain_K", np.concatenate(gains))
        self.codebooks = nn.Parameter(torch.zeros_like(self.base_books_K))
        for codec in self._codecs:
            if isinstance(codec, Bands) and len(codec.stored_C):
                _keep(self, _base(codec), arrays[codec.scales_name])
                self.scales[str(codec.tier)] = nn.Parameter(
                    torch.zeros_like(self.get_buffer(_base(codec)))
                )

    @torch.no_grad()
    def _deviation(self) -> float:
        """About how far values of a row lie from the mean: what a mean moves by."""
        squares = 0.0
        for codec in self._codecs:
            if isinstance(codec, Steps):
                spread_C = self.base_steps_T[codec.tier].expand(codec.count)
                rows_C = torch.arange(codec.count)
            elif len(codec.stored_C):
                spread_C = self.get_buffer(_base(codec))
                rows_C = torch.from_numpy(codec.stored_C)
            else:
                continue
            if self.basis is not None:
                spread_C = spread_C * self.basis.values_RD()[rows_C].norm(dim=1)
            squares = max(squares, float(spread_C.square().sum()))
        width = len(self.base_mean_D)
        return math.sqrt(squares / width) or math.sqrt(float(self.base_mean_D.square().mean()))

    def rows(self, pieces: Sequence[tuple[int, Tensor]], unit_nD: Tensor | None) -> Tensor:
        """Rows of the records of each piece, one piece after the other: float32 [n, D].

        Args:
            pieces: (index of the tier, records U8 [n, S]).
            unit_nD: unit embeddings of all rows in that order; None without predictor.
        """
        mean_D = self.mean_D()
        basis_RD = None if self.basis is None else self.basis.values_RD()
        expanded = []
        for tier, records_nS in pieces:
            coefficients_nC = self._coefficients(tier, records_nS)
            rows_C = self._parts[tier].basis_rows_C
            if basis_RD is not None:
                expanded.append(mean_D + coefficients_nC @ basis_RD[rows_C])
            elif not len(rows_C):
                expanded.append(mean_D.expand(len(records_nS), -1))
            else:
                full_nD = coefficients_nC.new_zeros(len(records_nS), len(mean_D))
                expanded.append(mean_D + rotated(full_nD.index_copy(1, rows_C, coefficients_nC)))
        rows_nD = torch.cat(expanded) * 2.0**self.exponent
        if self.predictor is None or unit_nD is None:
            return rows_nD
        weights_DD = self.predictor.values_RD() * 2.0**self.predictor_exponent
        return rows_nD + unit_nD @ weights_DD.T

    def _coefficients(self, tier: int, records_nS: Tensor) -> Tensor:
        part = self._parts[tier]
        if not len(part.basis_rows_C):
            return self.base_mean_D.new_zeros(len(records_nS), 0)
        if isinstance(part.fields, StepsFields):
            return part.fields.in_steps(records_nS) * self.steps_T()[tier]
        places_nC = part.fields.places(records_nS)
        units_nC = self.books_K().index_select(0, places_nC.view(-1)).view(places_nC.shape)
        return units_nC * self._scales_C(tier)

    def mean_D(self) -> Tensor:
        return _as_f16(self.base_mean_D + self._mean_unit * self.mean)

    def books_K(self) -> Tensor:
        """Codebooks one after the other; a value that would fall below the one before equals it."""
        moved_K = self.base_books_K + self.book_gain_K * self.codebooks
        rising = [book.cummax(dim=0).values for book in torch.split(moved_K, self._book_sizes)]
        return _as_f16(torch.cat(rising))

    def steps_T(self) -> Tensor:
        return self.base_steps_T * self.steps.exp()

    def _scales_C(self, tier: int) -> Tensor:
        base_C = self.get_buffer(f"base_scales_{tier}")
        return _as_f16(base_C * self.scales[str(tier)].exp())

    @torch.no_grad()
    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays as a bundle stores them, by their name in the layer."""
        arrays: dict[str, npt.NDArray[Any]] = {"mean": _f16(self.mean_D())}
        if self.basis is not None:
            arrays["basis"] = self.basis.packed()
            arrays["basis_scales"] = _f16(self.basis.scales_R())
        if self.predictor is not None:
            arrays["predictor"] = self.predictor.packed()
            arrays["predictor_scales"] = _f16(self.predictor.scales_R())
        if isinstance(self._codecs[0], Steps):
            arrays["steps"] = self.steps_T().cpu().numpy()
        elif self._codecs[0].codebooks:
            arrays["codebooks"] = _f16(self.books_K())
            arrays |= {f"scales.{tier}": _f16(self._scales_C(int(tier))) for tier in self.scales}
        return arrays

    def check(self, arrays: Arrays) -> None:
        """BundleError for arrays no encoder writes."""
        for codec in self._codecs:
            codec.check_shared(arrays)


def count_tuned(codecs: Sequence[Bands | Steps], predictor: Predictor | None) -> int:
    """How many numbers of a plane a `TunedLayer` has parameters for."""
    first = codecs[0]
    count = first.width
    if first.basis:
        count += first.rank * (first.width + 1)
    if predictor is not None:
        count += predictor.width * (predictor.width + 1)
    if isinstance(first, Steps):
        return count + first.tiers
    count += sum(1 << bits for bits in first.codebooks)
    return count + sum(len(codec.stored_C) for codec in codecs if isinstance(codec, Bands))


def _part(codec: Bands | Steps, arrays: Arrays, offset: int, device: torch.device) -> _TierPart:
    if isinstance(codec, Steps):
        rows_C = torch.arange(codec.count)
        return _TierPart(StepsFields([(codec, arrays, offset)], device), rows_C.to(device))
    rows_C = torch.from_numpy(codec.stored_C.copy())
    return _TierPart(BandsFields([(codec, arrays, offset)], device), rows_C.to(device))


def _base(codec: Bands) -> str:
    return f"base_scales_{codec.tier}"


def _keep(module: nn.Module, name: str, array: npt.NDArray[Any]) -> None:
    """What the bundle has: not part of a saved state, the bundle itself is at hand."""
    values = torch.from_numpy(np.array(array, np.float32))
    module.register_buffer(name, values, persistent=False)


def _as_f16(values: Tensor) -> Tensor:
    return values + (values.half().float() - values).detach()


def _f16(values: Tensor) -> npt.NDArray[np.float16]:
    return values.cpu().numpy().astype(np.float16)
