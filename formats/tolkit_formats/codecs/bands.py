"""bands: coefficients in a variance-ordered basis or a Hadamard rotation, each of its own width.

N rows in a batch, D values a row, R rows of the basis, C coefficients stored, B bytes of one plane.
A row's bytes are the codes of its coefficients, packed; everything else is shared by the rows of
a plane: codebooks, the scale of each coefficient (one set a tier), the basis and a mean.

    row = (mean + sum over r of codebook[code_r] * scale_r * basis_r) * 2^exponent
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.bitpack import FieldLayout, Run, SignedRows, field_widths
from tolkit_formats.codecs.base import (
    padded_bytes,
    read_integer,
    refuse_unknown,
    require_bounded,
    require_scales,
    require_zero_padding,
    shown,
)
from tolkit_formats.codecs.expansion import (
    MAX_WIDTH,
    expanded_rows,
    expansion_json,
    mean_rows,
    read_expansion,
    read_runs,
    runs_text,
)
from tolkit_formats.errors import BundleError

__all__ = ["Bands"]


@dataclass(frozen=True)
class Bands:
    """One plane of one tier.

    Attributes:
        tier: which set of scales, the number of the tier.
        runs: (count, bits 0-8) of the coefficients in the order of the basis; those left over
            have none.
        codebooks: the widths that have a codebook, ascending; equal in all tiers of a layer.
        basis: (count, bits 2-8) of the basis' rows; empty stands for the Hadamard rotation.
        exponent: power of two that all decoded values are multiplied by.
    """

    width: int
    tier: int
    runs: tuple[Run, ...]
    codebooks: tuple[int, ...]
    basis: tuple[Run, ...]
    exponent: int = 0

    @property
    def name(self) -> str:
        return "bands"

    @classmethod
    def from_json(cls, params: Mapping[str, object], width: int) -> Bands:
        known = {"name", "tier", "runs", "codebooks", "basis", "exponent"}
        refuse_unknown(params, "bands", frozenset(known))
        codebooks = _integers(params, "codebooks", 1, MAX_WIDTH)
        if list(codebooks) != sorted(set(codebooks)):
            raise BundleError("codec bands, codebooks: expected ascending widths, each once")
        codec = cls(
            width,
            read_integer(params, "tier", "bands", 0, 255),
            read_runs(params, "runs", "bands", 0, width),
            codebooks,
            *read_expansion(params, "bands", width),
        )
        if sum(count for count, _ in codec.runs) > codec.rank:
            raise BundleError(f"codec bands, runs: more coefficients than {codec.rank} basis rows")
        missing = sorted({bits for _, bits in codec.runs if bits} - set(codebooks))
        if missing:
            raise BundleError(f"codec bands, runs: no codebook for a width of {missing[0]} bits")
        return codec

    def to_json(self) -> dict[str, object]:
        return {
            "name": "bands",
            "tier": self.tier,
            "runs": runs_text(self.runs),
            "codebooks": list(self.codebooks),
            **expansion_json(self.basis, self.exponent),
        }

    @property
    def rank(self) -> int:
        """R, rows of the basis."""
        return sum(count for count, _ in self.basis) if self.basis else self.width

    @cached_property
    def widths_R(self) -> NDArray[np.int64]:
        """Bits of each coefficient of the basis' rows: int64 [R]."""
        widths = field_widths(self.runs)
        return np.pad(widths, (0, self.rank - len(widths)))

    @cached_property
    def stored_C(self) -> NDArray[np.int64]:
        """Indices of the coefficients that have bits."""
        return np.flatnonzero(self.widths_R)

    @property
    def scales_name(self) -> str:
        """Of the shared array that is this tier's own."""
        return f"scales.{self.tier}"

    def segments(self) -> tuple[int, int]:
        return 0, padded_bytes(self._layout.size_bytes)

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {"mean": ("F16", (self.width,))}
        if self.codebooks:
            shapes["codebooks"] = ("F16", (sum(1 << bits for bits in self.codebooks),))
        if len(self.stored_C):
            shapes[self.scales_name] = ("F16", (len(self.stored_C),))
        if self.basis:
            size_bytes = sum(rows.size_bytes for rows in self._basis_rows())
            shapes |= {"basis": ("U8", (size_bytes,)), "basis_scales": ("F16", (self.rank,))}
        return shapes

    def prepared(self, shared: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """The shared arrays of this tier widened to float32, the basis [C, D] expanded.

        Raises:
            BundleError: a basis code no encoder writes.
        """
        wide = {"mean": np.asarray(shared["mean"], np.float32)}
        if not len(self.stored_C):
            return wide
        wide["codebooks"] = np.asarray(shared["codebooks"], np.float32)
        wide["scales"] = np.asarray(shared[self.scales_name], np.float32)
        if self.basis:
            wide["basis"] = self.basis_rows(shared)[self.stored_C]
        return wide

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """As `Codec.decode`; arrays of `prepared` are used as they are."""
        if not len(self.stored_C):
            return mean_rows(len(plane_NB), shared["mean"], self.exponent)
        wide = shared if "scales" in shared else self.prepared(shared)
        return expanded_rows(
            self.coefficients(plane_NB, wide),
            wide["basis"] if self.basis else None,
            self.stored_C,
            wide["mean"],
            self.exponent,
        )

    def coefficients(
        self, plane_NB: NDArray[np.uint8], prepared: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Values of the stored coefficients before the basis: float32 [N, C]."""
        index_NC = self._layout.unpack(plane_NB) + self._codebook_start_C
        values_NC: NDArray[np.float32] = np.take(prepared["codebooks"], index_NC)
        values_NC *= prepared["scales"]
        return values_NC

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        used = self._layout.size_bytes
        require_zero_padding(plane_NB[:, used:], "bands codes")
        spare = np.uint8((1 << self._layout.spare_bits) - 1)
        require_zero_padding(plane_NB[:, max(used - 1, 0) : used] & spare, "bands codes")

    def check_shared(self, shared: Mapping[str, NDArray[Any]]) -> None:
        """Refuse shared arrays no encoder writes; BundleError names the array."""
        if not np.isfinite(shared["mean"]).all():
            raise BundleError("mean: holds NaN or infinity")
        largest = float(np.abs(shared["mean"]).max())
        if len(self.stored_C):
            require_scales(shared[self.scales_name], self.scales_name)
            largest += self._check_codebooks(shared)
        if self.basis:
            require_scales(shared["basis_scales"], "basis_scales")
            for rows, packed_B in self._basis_pieces(shared):
                rows.check(packed_B, "basis")
                rows.unpack(packed_B, "basis")
        require_bounded(largest * 2.0**self.exponent, "bands")

    def _check_codebooks(self, shared: Mapping[str, NDArray[Any]]) -> float:
        """Largest value they can lead to, before the exponent."""
        wide = self.prepared(shared)
        peaks = {}
        start = 0
        for bits in self.codebooks:
            book = wide["codebooks"][start : start + (1 << bits)]
            if not np.isfinite(book).all() or (np.diff(book) < 0).any():
                raise BundleError(f"codebooks: of {bits} bits is not a rising list of numbers")
            peaks[bits] = float(np.abs(book).max())
            start += 1 << bits
        peak_C = np.array([peaks[int(bits)] for bits in self.widths_R[self.stored_C]])
        reach_C = np.abs(wide["basis"]).max(axis=1) if self.basis else np.ones(len(peak_C))
        return float((peak_C * wide["scales"].astype(np.float64) * reach_C).sum())

    def _basis_rows(self) -> list[SignedRows]:
        return [SignedRows(count, self.width, bits) for count, bits in self.basis]

    def _basis_pieces(
        self, shared: Mapping[str, NDArray[Any]]
    ) -> list[tuple[SignedRows, NDArray[np.uint8]]]:
        packed_B = np.asarray(shared["basis"])
        pieces = []
        start = 0
        for rows in self._basis_rows():
            pieces.append((rows, packed_B[start : start + rows.size_bytes]))
            start += rows.size_bytes
        return pieces

    def basis_rows(self, shared: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """All rows of the basis expanded: float32 [R, D]; BundleError for an illegal code."""
        scales_R1 = np.asarray(shared["basis_scales"], np.float32)[:, None]
        basis_RD: NDArray[np.float32] = self.basis_numbers(shared) * scales_R1
        return basis_RD

    def basis_numbers(self, shared: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The same before the scales, whole numbers -127..127."""
        pieces = [rows.unpack(part_B, "basis") for rows, part_B in self._basis_pieces(shared)]
        return np.concatenate(pieces)

    @cached_property
    def _layout(self) -> FieldLayout:
        return FieldLayout(self.widths_R[self.stored_C])

    @cached_property
    def _codebook_start_C(self) -> NDArray[np.uint16]:
        starts = {}
        position = 0
        for bits in self.codebooks:
            starts[bits] = position
            position += 1 << bits
        return np.array([starts[int(b)] for b in self.widths_R[self.stored_C]], np.uint16)


def _integers(params: Mapping[str, object], field: str, low: int, high: int) -> tuple[int, ...]:
    value = params.get(field)
    if not isinstance(value, list) or len(value) > high:
        raise BundleError(f"codec bands, {field}: expected a list, got {shown(value)}")
    return tuple(read_integer({field: item}, field, "bands", low, high) for item in value)
