"""steps: coefficients in multiples of one step a tier, as symbols for the entropy coder (SPEC 1.1).

N rows in a batch, D values a row, R rows of the basis, C coefficients a tier codes, F of them in
two symbols, P = C + F, K classes (the coder's models), S symbols. A plane is P bytes, symbols
0..S-1, the second ones behind the first; how many bits that takes in a record is the business of
the coder (see `tolkit_formats.entropy`).

    row = (mean + step_of_tier * sum over c of level[class_c, symbol_c] * basis_c) * 2^exponent

The basis' rows carry the scales of their coefficients, so that one step serves them all. Symbol 0
is level 0, symbol 2m - 1 is m and symbol 2m is -m steps, each less an offset towards zero. Where
a coefficient is many steps wide its first symbol counts in 2^fine steps and a second one adds what
is left of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.bitpack import Run, field_widths
from tolkit_formats.codecs.bands import Bands
from tolkit_formats.codecs.base import read_integer, refuse_unknown
from tolkit_formats.codecs.expansion import (
    expanded_rows,
    expansion_json,
    mean_rows,
    read_expansion,
    read_runs,
    runs_text,
)
from tolkit_formats.errors import BundleError

__all__ = ["MAX_FINE_BITS", "OFFSETS", "Steps", "levels"]

OFFSETS = 3
"""Offsets of a class: of magnitudes 1, 2 and those above."""

MAX_FINE_BITS = 7


@dataclass(frozen=True)
class Steps:
    """One plane of one tier.

    Attributes:
        tier: which step and classes, the number of the tier.
        tiers: how many there are.
        count: C, coefficients coded: the first ones of the basis.
        basis: (count, bits 2-8) of the basis' rows; empty stands for the Hadamard rotation.
        exponent: power of two that all decoded values are multiplied by.
        fine: (count, bits 0-7) of the first coefficients; those with bits have two symbols.
    """

    width: int
    tier: int
    tiers: int
    count: int
    basis: tuple[Run, ...]
    exponent: int = 0
    fine: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return "steps"

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> Steps:
        known = {"name", "tier", "tiers", "count", "basis", "exponent", "fine"}
        refuse_unknown(params, "steps", frozenset(known))
        tiers = read_integer(params, "tiers", "steps", 1, 256)
        count = read_integer(params, "count", "steps", 0, width)
        fine = read_runs({"fine": "", **params}, "fine", "steps", 0, count)
        if any(bits > MAX_FINE_BITS for _, bits in fine):
            raise BundleError(f"codec steps, fine: expected 0..{MAX_FINE_BITS} bits")
        codec = cls(
            width,
            read_integer(params, "tier", "steps", 0, tiers - 1),
            tiers,
            count,
            *read_expansion(params, "steps", width),
            fine,
        )
        if codec.count > codec.rank:
            raise BundleError(
                f"codec steps, count: {codec.count} coefficients, the basis has {codec.rank} rows"
            )
        return codec

    def to_json(self) -> dict[str, object]:
        params: dict[str, object] = {
            "name": "steps",
            "tier": self.tier,
            "tiers": self.tiers,
            "count": self.count,
            **expansion_json(self.basis, self.exponent),
        }
        if self.fine:
            params["fine"] = runs_text(self.fine)
        return params

    @property
    def rank(self) -> int:
        """R, rows of the basis."""
        return self._expansion.rank

    @property
    def classes_name(self) -> str:
        """Of the shared array that is this tier's own."""
        return f"classes.{self.tier}"

    @cached_property
    def fine_C(self) -> NDArray[np.int64]:
        """Bits that the second symbol of each coefficient adds, 0 where it has none: [C]."""
        bits_C = np.zeros(self.count, np.int64)
        given = field_widths(self.fine)
        bits_C[: len(given)] = given
        return bits_C

    @property
    def num_symbols(self) -> int:
        """P, symbols of a row."""
        return self.count + int(np.count_nonzero(self.fine_C))

    def segments(self) -> tuple[int, int]:
        return 0, self.num_symbols

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = dict(self._expansion.shared_shapes())
        shapes["steps"] = ("F32", (self.tiers,))
        if self.count:
            shapes[self.classes_name] = ("U8", (self.num_symbols,))
        return shapes

    def prepared(self, shared: Mapping[str, NDArray[np.generic]]) -> Mapping[str, NDArray[Any]]:
        """What `decode` works with: the basis [C, D] times the step, levels [K x S].

        Args:
            shared: the plane's arrays and the coder's `symbols` and `offsets`.

        Raises:
            BundleError: a basis code no encoder writes, a class without a model.
        """
        wide: dict[str, NDArray[Any]] = {"mean": np.asarray(shared["mean"], np.float32)}
        if not self.count:
            return wide
        num_classes, num_symbols = len(shared["symbols"]), int(shared["symbols"].max())
        classes_P = np.asarray(shared[self.classes_name], np.int64)
        if classes_P.max() >= num_classes:
            raise BundleError(
                f"codec steps: class {classes_P.max()}, expected one below {num_classes}"
            )
        offsets_K3 = np.asarray(shared["offsets"], np.float32)
        levels_KS = levels(offsets_K3, num_symbols)
        whole_S = levels(np.zeros((1, OFFSETS), np.float32), num_symbols)
        wide["levels"] = np.concatenate([levels_KS, whole_S]).reshape(-1)
        first_P = classes_P * num_symbols
        first_P[: self.count][self.fine_C > 0] = num_classes * num_symbols  # whole numbers
        wide["first"] = first_P
        step = np.asarray(shared["steps"], np.float32)[self.tier]
        if self.basis:
            wide["basis"] = self.basis_rows(shared)[: self.count] * step
        else:
            wide["basis"] = np.full((1, 1), step, np.float32)
        return wide

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """As `Codec.decode`; arrays of `prepared` are used as they are."""
        if not self.count:
            return mean_rows(len(plane_NB), shared["mean"], self.exponent)
        wide = shared if "levels" in shared else self.prepared(shared)
        values_NC = self.coefficients(plane_NB, wide)
        if not self.basis:
            values_NC *= wide["basis"]  # the step alone
        return expanded_rows(
            values_NC,
            wide["basis"] if self.basis else None,
            slice(self.count),
            wide["mean"],
            self.exponent,
        )

    def coefficients(
        self, plane_NB: NDArray[np.uint8], prepared: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Levels of the coefficients, in steps: float32 [N, C]."""
        values_NP: NDArray[np.float32] = np.take(prepared["levels"], plane_NB + prepared["first"])
        if not self.fine:
            return values_NP
        values_NC = values_NP[:, : self.count]
        two = np.flatnonzero(self.fine_C)
        # Exact: a whole number times a power of two.
        values_NC[:, two] *= np.float32(2.0) ** self.fine_C[two]
        values_NC[:, two] += values_NP[:, self.count :]
        return values_NC

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        """Nothing: the coder gives only symbols its models allow."""

    def check_shared(self, shared: Mapping[str, NDArray[np.generic]]) -> None:
        """Refuse arrays no encoder writes: BundleError names the array."""
        self._expansion.check_shared(shared)
        steps = np.asarray(shared["steps"], np.float32)
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise BundleError("steps: expected finite numbers above 0")

    def basis_rows(self, shared: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
        """All rows of the basis without the step: float32 [R, D]; BundleError for a bad code."""
        return self._expansion.basis_rows(shared)

    def basis_numbers(self, shared: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
        """The same before the scales, whole numbers -127..127."""
        return self._expansion.basis_numbers(shared)

    @cached_property
    def _expansion(self) -> Bands:
        """Mean and basis are stored as codec bands stores them."""
        return Bands(self.width, 0, (), (), self.basis, self.exponent)


def levels(offsets_K3: NDArray[np.float32], num_symbols: int) -> NDArray[np.float32]:
    """What each symbol of each class stands for, in steps: float32 [K, S]."""
    magnitude_S = (np.arange(num_symbols) + 1) // 2
    which_S = np.clip(magnitude_S, 1, OFFSETS) - 1
    levels_KS = magnitude_S.astype(np.float32) - offsets_K3[:, which_S]
    levels_KS[:, 0] = 0
    levels_KS[:, 2::2] *= -1
    return levels_KS
