"""Encoder of steps: coefficients by the analysis matrix, rounded to whole steps with a dead zone.

N rows in a batch, D values a row, C coefficients coded, F of them in two symbols, P = C + F,
K classes.
Besides the stored arrays `shared` has what is only needed to encode: the analysis matrix, and
where each class rounds (`StepTables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.compress.codecs.bands import ANALYSIS
from tolkit.compress.codecs.base import refuse_non_finite
from tolkit.rotation import rotated
from tolkit_formats.codecs import Steps

__all__ = ["StepTables", "StepsEncoder", "quantised_steps"]


@dataclass(frozen=True)
class StepTables:
    """How each class rounds and what a reader makes of it.

    Attributes:
        zero_K: what is nearer to zero, in steps, becomes zero.
        shift_K: magnitudes above 1 begin so much further out than in the middle.
        largest_K: magnitudes are cut off there; 0 codes nothing.
        offsets_K3: stored offsets towards zero of magnitudes 1, 2 and more.
    """

    zero_K: Tensor
    shift_K: Tensor
    largest_K: Tensor
    offsets_K3: Tensor

    def to_shared(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {
            "zero": self.zero_K,
            "shift": self.shift_K,
            "largest": self.largest_K,
            "offsets": self.offsets_K3,
        }

    def whole(self) -> StepTables:
        """For the first of two symbols: to the nearest whole number, read as that."""
        return StepTables(
            torch.full_like(self.zero_K, 0.5),
            torch.zeros_like(self.shift_K),
            self.largest_K,
            torch.zeros_like(self.offsets_K3),
        )

    @classmethod
    def of_shared(cls, shared: Mapping[str, Tensor]) -> StepTables:
        """From named tensors."""
        return cls(shared["zero"], shared["shift"], shared["largest"], shared["offsets"])


def quantised_steps(
    units_NC: Tensor, classes_P: Tensor, fine_C: Tensor, tables: StepTables
) -> tuple[Tensor, Tensor]:
    """Symbols uint8 [N, P] of coefficients in steps, and the levels [N, C] a reader takes them for.

    Args:
        classes_P: of the coefficients, then of the second symbols.
        fine_C: int64, bits the second symbol of a coefficient adds, 0 where it has none.
    """
    classes_C, classes_F = classes_P.tensor_split([len(fine_C)])
    symbols_NC, values_NC = _rounded(units_NC, classes_C, tables)
    if not len(classes_F):
        return symbols_NC, values_NC
    two = torch.nonzero(fine_C)[:, 0]
    units_NF, width_F = units_NC[:, two], 2.0 ** fine_C[two].float()
    first_NF, whole_NF = _rounded(units_NF / width_F, classes_C[two], tables.whole())
    whole_NF *= width_F
    second_NF, rest_NF = _rounded(units_NF - whole_NF, classes_F, tables)
    symbols_NC[:, two] = first_NF
    values_NC[:, two] = whole_NF + rest_NF
    return torch.cat([symbols_NC, second_NF], dim=1), values_NC


def _rounded(units_NC: Tensor, classes_C: Tensor, tables: StepTables) -> tuple[Tensor, Tensor]:
    """Symbols and levels of one symbol each."""
    distance_NC = units_NC.abs()
    magnitude_NC = (distance_NC + (0.5 - tables.shift_K[classes_C])).floor_().clamp_(min=1)
    magnitude_NC *= distance_NC >= tables.zero_K[classes_C]
    magnitude_NC = torch.minimum(magnitude_NC, tables.largest_K[classes_C])
    first_C, second_C, more_C = tables.offsets_K3[classes_C].unbind(dim=1)
    offset_NC = torch.where(magnitude_NC == 1, first_C, more_C)
    offset_NC = torch.where(magnitude_NC == 2, second_C, offset_NC)
    coded_NC = magnitude_NC > 0
    values_NC = torch.copysign((magnitude_NC - offset_NC) * coded_NC, units_NC)
    positive_NC = coded_NC & (units_NC > 0)
    symbols_NC = (2 * magnitude_NC).to(torch.uint8) - positive_NC.to(torch.uint8)
    return symbols_NC, values_NC


@dataclass(frozen=True)
class StepsEncoder:
    """Rounds coefficient by coefficient; the bytes are symbols for the entropy coder."""

    codec: Steps

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `Encoder.encode`; `shared` has float32 `mean`, `steps`, `basis` and `analysis` [D, R]
        (neither of the two for Hadamard), int64 `classes.T`, and the tensors of `StepTables`."""
        codec = self.codec
        refuse_non_finite(target_ND)
        power = 2.0**codec.exponent
        decoded_ND = shared["mean"].repeat(len(target_ND), 1)
        symbols_NP = torch.zeros((len(target_ND), codec.num_symbols), dtype=torch.uint8)
        if codec.count:
            centred_ND = torch.add(target_ND / power, shared["mean"], alpha=-1)
            step = shared["steps"][codec.tier]
            units_NC = self._coefficients(centred_ND, shared) / step
            classes_P, fine_C = shared[codec.classes_name], torch.from_numpy(codec.fine_C)
            tables = StepTables.of_shared(shared)
            symbols_NP, values_NC = quantised_steps(units_NC, classes_P, fine_C, tables)
            decoded_ND += self._expanded(values_NC, step, shared)
        if codec.exponent:
            decoded_ND *= power
        return symbols_NP, decoded_ND

    def _coefficients(self, centred_ND: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if not self.codec.basis:
            return rotated(centred_ND)[:, : self.codec.count]
        return centred_ND @ shared[ANALYSIS][:, : self.codec.count]

    def _expanded(self, values_NC: Tensor, step: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if self.codec.basis:
            return values_NC @ (shared["basis"][: self.codec.count] * step)
        full_NR = values_NC.new_zeros((len(values_NC), self.codec.width))
        full_NR[:, : self.codec.count] = values_NC * step
        return rotated(full_NR)
