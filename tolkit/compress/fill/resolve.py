"""From fits and widths to what is stored: codecs, shared arrays, and what encoding needs beside.

V vocabulary, D hidden, T tiers, R rows of a basis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.codecs.bands import ANALYSIS
from tolkit.compress.fill.allocate import Allocation
from tolkit.compress.fill.transform import Quantised
from tolkit.compress.fill.walk_bands import LayerFit
from tolkit_formats.bitpack import Run, pack
from tolkit_formats.codecs import Bands
from tolkit_formats.predictor import Predictor

__all__ = [
    "BandsLayer",
    "LayerCodecs",
    "WorkingArrays",
    "layer_codecs",
    "packed_rows",
    "resolve",
    "runs_of",
    "stored_predictor",
]

_LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Analysis:
    analysis_DR: Tensor  # in a file
    used_R: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BandsLayer:
    """One layer, decided.

    Attributes:
        codecs: one a tier.
        predictor: None without.
        stored: arrays for tables/bases.safetensors: name -> (dtype, array).
        analysis: what turns targets into coefficients; None for Hadamard.
    """

    codecs: tuple[Bands, ...]
    predictor: Predictor | None
    stored: Mapping[str, tuple[str, npt.NDArray[Any]]]
    analysis: _Analysis | None

    def working(self) -> dict[str, Tensor]:
        """Float32 tensors the encoder takes; expanded anew at every call."""
        arrays = {name: array for name, (_, array) in self.stored.items()}
        wide = {
            name: torch.from_numpy(array.astype(np.float32))
            for name, array in arrays.items()
            if array.dtype == np.float16
        }
        (some, *_) = self.codecs
        if some.basis:
            wide["basis"] = torch.from_numpy(some.basis_rows(arrays))
        if self.analysis is not None and some.basis:
            columns = torch.from_numpy(self.analysis.used_R)
            wide[ANALYSIS] = self.analysis.analysis_DR[:, columns]
        if self.predictor is not None:
            wide["predictor"] = torch.from_numpy(self.predictor.weights_DD(arrays))
        return wide


class _Working(Protocol):
    def working(self) -> dict[str, Tensor]: ...


class WorkingArrays(Mapping[int, Mapping[str, Tensor]]):
    """Layer -> its `working` arrays, made when asked for and not kept."""

    def __init__(self, layers: Mapping[int, _Working]) -> None:
        self._layers = layers

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        return self._layers[layer].working()

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def runs_of(bits: Sequence[int]) -> tuple[Run, ...]:
    """Neighbours of equal width as (count, bits), without a tail of no bits."""
    runs = [(len(list(group)), int(width)) for width, group in groupby(bits)]
    if runs and runs[-1][1] == 0:
        runs.pop()
    return tuple(runs)


@dataclass(frozen=True)
class LayerCodecs:
    """How one layer is stored; sizes follow from it, arrays do not.

    Attributes:
        codecs: one a tier.
        predictor: None without.
        used: rows of the fit's basis that some tier has bits for.
    """

    codecs: tuple[Bands, ...]
    predictor: Predictor | None
    used: npt.NDArray[np.int64]

    def shared_shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of the arrays all rows share, in all tiers."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for codec in self.codecs:
            shapes |= codec.shared_shapes()
        return shapes | ({} if self.predictor is None else dict(self.predictor.shared_shapes()))


def layer_codecs(fit: LayerFit, widths_TR: npt.NDArray[np.int64], width: int) -> LayerCodecs:
    """The codecs that widths [T, R] ask for."""
    used = np.flatnonzero(widths_TR.max(axis=0))
    basis: tuple[Run, ...] = ()
    if fit.basis is None:
        used = np.arange(width)
    else:
        basis = runs_of(fit.basis_bits_R[used].tolist())
    books = tuple(int(bits) for bits in np.unique(widths_TR) if bits)
    codecs = tuple(
        Bands(width, tier, runs_of(widths_R[used].tolist()), books, basis, fit.exponent)
        for tier, widths_R in enumerate(widths_TR)
    )
    weights = fit.predictor
    predictor = None
    if weights is not None:
        predictor = Predictor(width, fit.predictor_bits, weights.exponent)
    return LayerCodecs(codecs, predictor, used)


def resolve(fits: Sequence[LayerFit], allocation: Allocation, width: int) -> list[BandsLayer]:
    """Everything to store for each layer."""
    return [
        _layer(fit, widths_TR, layer_codecs(fit, widths_TR, width))
        for fit, widths_TR in zip(fits, allocation.widths, strict=True)
    ]


def _layer(fit: LayerFit, widths_TR: npt.NDArray[np.int64], decided: LayerCodecs) -> BandsLayer:
    used = decided.used
    power = 2.0**-fit.exponent
    stored: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "mean": ("F16", (fit.mean_D * power).numpy().astype(np.float16))
    }
    books = [fit.codebook(int(bits)) for bits in np.unique(widths_TR) if bits]
    if books:
        stored["codebooks"] = ("F16", np.concatenate(books).astype(np.float16))
    if fit.basis is not None and len(used):
        kept = torch.from_numpy(used)
        # The rows have norm 1, so their exponent is one f16 scales can take in.
        scales_R = fit.basis.scales_R[kept] * 2.0**fit.basis.exponent
        stored["basis"] = ("U8", packed_rows(fit.basis.codes_RD[kept], fit.basis_bits_R[used]))
        stored["basis_scales"] = ("F16", scales_R.numpy().astype(np.float16))
    for tier, codec in enumerate(decided.codecs):
        if len(codec.stored_C):
            deviations = np.sqrt(fit.variances_TR[tier, used][codec.stored_C]) * power
            # A tier may vary far more than all rows together, whose exponent this is.
            scales_C = np.minimum(deviations, _LARGEST_F16).astype(np.float16)
            stored[codec.scales_name] = ("F16", scales_C)
    stored_predictor(fit.predictor, fit.predictor_bits, stored)
    analysis = None if fit.basis is None else _Analysis(fit.analysis_DR, used)
    return BandsLayer(decided.codecs, decided.predictor, stored, analysis)


def stored_predictor(
    weights: Quantised | None, bits: int, stored: dict[str, tuple[str, npt.NDArray[Any]]]
) -> Predictor | None:
    """The predictor of these weights; its arrays are added to `stored`."""
    if weights is None:
        return None
    width = len(weights.codes_RD)
    packed = packed_rows(weights.codes_RD, np.full(width, bits))
    stored["predictor"] = ("U8", packed)
    stored["predictor_scales"] = ("F16", weights.scales_R.numpy().astype(np.float16))
    return Predictor(width, bits, weights.exponent)


def packed_rows(codes_RD: Tensor, bits_R: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Codes -m..m of each row as fields 0..2m, every row from a byte of its own."""
    rows = []
    for start, count, bits in _runs_at(bits_R):
        largest = (1 << (bits - 1)) - 1
        fields = (codes_RD[start : start + count].numpy().astype(np.int16) + largest).astype(
            np.uint8
        )
        rows.append(pack(fields, np.full(fields.shape[1], bits)).reshape(-1))
    return np.concatenate(rows)


def _runs_at(bits_R: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    result = []
    start = 0
    for count, bits in ((len(list(g)), int(b)) for b, g in groupby(bits_R.tolist())):
        result.append((start, count, bits))
        start += count
    return result
