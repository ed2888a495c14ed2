"""From fits and widths to what is stored: codecs, shared arrays, and what encoding needs beside.

V vocabulary, D hidden, T tiers, R rows of a basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.allocate import Allocation
from tolkit.compress.bands import LayerFit, codebooks_of
from tolkit.compress.codecs.bands import ANALYSIS
from tolkit.compress.transform import Quantised
from tolkit_formats.bitpack import Run, pack
from tolkit_formats.codecs import Bands
from tolkit_formats.predictor import Predictor

__all__ = ["BandsLayer", "LayerCodecs", "layer_codecs", "resolve", "runs_of"]


_LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class BandsLayer:
    """One layer, decided.

    Attributes:
        codecs: one a tier.
        predictor: None without.
        stored: arrays for tables/bases.safetensors: name -> (dtype, array).
        working: float32 tensors the encoder takes.
    """

    codecs: tuple[Bands, ...]
    predictor: Predictor | None
    stored: Mapping[str, tuple[str, npt.NDArray[Any]]]
    working: Mapping[str, Tensor]


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
        Bands(width, tier, runs_of(widths_R[used].tolist()), books, basis, fit.transform.exponent)
        for tier, widths_R in enumerate(widths_TR)
    )
    weights = fit.transform.predictor
    predictor = None
    if weights is not None:
        predictor = Predictor(width, fit.transform.predictor_bits, weights.exponent)
    return LayerCodecs(codecs, predictor, used)


def resolve(fits: Sequence[LayerFit], allocation: Allocation, width: int) -> list[BandsLayer]:
    """Everything to store for each layer."""
    return [
        _layer(fit, widths_TR, layer_codecs(fit, widths_TR, width))
        for fit, widths_TR in zip(fits, allocation.widths, strict=True)
    ]


def _layer(fit: LayerFit, widths_TR: npt.NDArray[np.int64], decided: LayerCodecs) -> BandsLayer:
    transform = fit.transform
    used = decided.used
    books = codebooks_of(fit, widths_TR)
    power = 2.0**-transform.exponent
    mean_D = (transform.mean_D * power).numpy().astype(np.float16)
    stored: dict[str, tuple[str, npt.NDArray[Any]]] = {"mean": ("F16", mean_D)}
    working = {"mean": _wide(mean_D)}
    if books:
        codebooks = np.concatenate([books[bits] for bits in sorted(books)]).astype(np.float16)
        stored["codebooks"] = ("F16", codebooks)
        working["codebooks"] = _wide(codebooks)
    if fit.basis is not None and len(used):
        kept = torch.from_numpy(used)
        basis = Quantised(fit.basis.codes_RD[kept], fit.basis.scales_R[kept], fit.basis.exponent)
        bits_R = fit.basis_bits_R[used]
        # The rows have norm 1, so their exponent is one f16 scales can take in.
        scales_R = (basis.scales_R * 2.0**basis.exponent).numpy().astype(np.float16)
        stored["basis"] = ("U8", _packed_rows(basis.codes_RD, bits_R))
        stored["basis_scales"] = ("F16", scales_R)
        working["basis"] = basis.codes_RD.float() * _wide(scales_R)[:, None]
        working[ANALYSIS] = transform.analysis_DR[:, kept].float()
    for tier, codec in enumerate(decided.codecs):
        if len(codec.stored_C):
            deviations = np.sqrt(fit.variances_TR[tier, used][codec.stored_C]) * power
            # A tier may vary far more than all rows together, whose exponent this is.
            scales_C = np.minimum(deviations, _LARGEST_F16).astype(np.float16)
            stored[codec.scales_name] = ("F16", scales_C)
            working[codec.scales_name] = _wide(scales_C)
    weights = transform.predictor
    if weights is not None:
        bits_D = np.full(len(weights.codes_RD), transform.predictor_bits)
        scales_D = weights.scales_R.numpy().astype(np.float16)
        stored["predictor"] = ("U8", _packed_rows(weights.codes_RD, bits_D))
        stored["predictor_scales"] = ("F16", scales_D)
        working["predictor"] = weights.values_RD.float()
    return BandsLayer(decided.codecs, decided.predictor, stored, working)


def _packed_rows(codes_RD: Tensor, bits_R: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Codes -m..m of each row as fields 0..2m, every row from a byte of its own."""
    rows = []
    for start, count, bits in _runs_at(bits_R):
        largest = (1 << (bits - 1)) - 1
        fields = (codes_RD[start : start + count].numpy() + largest).astype(np.uint8)
        rows.append(pack(fields, np.full(fields.shape[1], bits)).reshape(-1))
    return np.concatenate(rows)


def _runs_at(bits_R: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    result = []
    start = 0
    for count, bits in ((len(list(g)), int(b)) for b, g in groupby(bits_R.tolist())):
        result.append((start, count, bits))
        start += count
    return result


def _wide(values: npt.NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
