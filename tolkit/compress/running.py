"""What the model sees of a block of rows, layer by layer: the running sum and its error.

N rows of a block, D hidden. See tolkit_formats.layer_errors for what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tolkit_formats.layer_errors import ErrorSums

__all__ = ["RunningSum", "squares", "sums_from_json", "sums_to_json"]


@dataclass
class RunningSum:
    """Of one block of rows.

    Attributes:
        total_ND: sum of the source's tables up to the last layer passed; None is zero.
        moved_ND: of it, what the planes so far do not stand for (tables dropped, or folded into a
            later plane), minus what they stand for too early; None is zero.
        held: tables by layer that will be needed once more: read at their own layer and folded
            into a later one, or the other way round.
    """

    total_ND: Tensor | None = None
    moved_ND: Tensor | None = None
    held: dict[int, Tensor] = field(default_factory=dict)

    def advance(self, layer: int, tables: Mapping[int, Tensor], *, kept: bool, whole: bool) -> None:
        """Pass one layer.

        Args:
            tables: by source layer, ascending: what the layer's plane stands for, or without a
                plane its own table if the source has one. Float32 [N, D], not changed.
            kept: whether the layer has a plane.
            whole: whether the planes up to here stand for just the tables up to here.
        """
        if layer in tables:
            self.total_ND = _added(self.total_ND, tables[layer])
        if whole:
            self.moved_ND = None
            return
        for member, table_ND in tables.items():
            if not kept:
                self.moved_ND = _added(self.moved_ND, table_ND)
            elif member != layer:
                self.moved_ND = _added(self.moved_ND, table_ND, -1)

    def squares(self, carry_ND: Tensor | None) -> tuple[float, float]:
        """Of the sum, and of its error given `carry_ND`: what the planes have lost of the tables
        they stand for."""
        parts = [part_ND for part_ND in (carry_ND, self.moved_ND) if part_ND is not None]
        off = squares(parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])) if parts else 0.0
        return 0.0 if self.total_ND is None else squares(self.total_ND), off


def _added(sum_ND: Tensor | None, part_ND: Tensor, sign: int = 1) -> Tensor:
    """A sum of its own: parts are never changed."""
    return part_ND * sign if sum_ND is None else sum_ND.add_(part_ND, alpha=sign)


def squares(values_ND: Tensor) -> float:
    """Sum of squares: a row in float32, rows in float64 (as fast as all in float32)."""
    norms_N = torch.linalg.vector_norm(values_ND, dim=1).double()
    return float(norms_N.square().sum())


def sums_to_json(errors: list[ErrorSums]) -> list[list[str]]:
    """To the last bit, infinities of overflowing tables included."""
    return [[value.hex() for value in vars(sums).values()] for sums in errors]


def sums_from_json(note: Any) -> list[ErrorSums]:
    """The inverse of `sums_to_json`."""
    return [ErrorSums(*(float.fromhex(value) for value in values)) for values in note]
