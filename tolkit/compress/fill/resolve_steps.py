"""From fits and symbol counts to what is stored: codecs, models and shared arrays of `steps`.

V vocabulary, D hidden, T tiers, R rows of a basis, G classes, K those in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.codecs.bands import ANALYSIS
from tolkit.compress.codecs.steps import StepTables
from tolkit.compress.fill.resolve import packed_rows, runs_of, stored_predictor
from tolkit.compress.fill.step_classes import CLASSES
from tolkit.compress.fill.walk_steps import StepsFit, Symbols
from tolkit_formats.bitpack import Run
from tolkit_formats.codecs import Steps
from tolkit_formats.entropy import Coding, stored_models
from tolkit_formats.predictor import Predictor
from tolkit_formats.rans_models import Models, normalised

__all__ = ["CodedModels", "StepsLayer", "class_models", "resolve_steps"]

Stored = Mapping[str, tuple[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class CodedModels:
    """The models of a bundle.

    Attributes:
        models: one a class in use.
        place_G: its number there for each class of the grid, -1 for those not in use.
        tables: of the classes in use.
        stored: arrays for tables/bases.safetensors under their own names.
        bits_GS: what each symbol costs, 0 where it cannot occur.
    """

    models: Models
    place_G: npt.NDArray[np.int64]
    tables: StepTables
    stored: Stored
    bits_GS: npt.NDArray[np.float64]

    def coding(self, lanes: int) -> Coding:
        """For the manifest."""
        return Coding(lanes, self.models.num_models, len(self.stored["frequencies"][1]))


def class_models(fits: Sequence[StepsFit], symbols: Symbols, tables: StepTables) -> CodedModels:
    """Frequency tables of the classes that the fits use.

    A class can code what it was seen to hold, and everything nearer to zero.
    """
    used = {0}
    for fit in fits:
        tiers, count = fit.class_TR.shape
        used |= {int(c) for tier in range(tiers) for c in fit.classes_of(tier, count)}
    order = np.array(sorted(used))
    counts_KS = symbols.counts_TGS.sum(axis=0)[order]
    largest_K = np.array([_largest(counts_S) for counts_S in counts_KS])
    codable_KS = np.arange(counts_KS.shape[1]) <= 2 * largest_K[:, None]
    counts_KS = np.where(codable_KS, np.maximum(counts_KS, 0.5), 0.0)
    freqs_KS = normalised(counts_KS[:, : 2 * int(largest_K.max()) + 1])
    place_G = np.full(CLASSES, -1)
    place_G[order] = np.arange(len(order))
    kept = torch.from_numpy(order)
    cut = StepTables(
        tables.zero_K[kept],
        tables.shift_K[kept],
        torch.from_numpy(largest_K).float(),
        tables.offsets_K3[kept],
    )
    arrays = stored_models(freqs_KS)
    offsets_K3 = cut.offsets_K3.numpy().astype(np.float16)
    bits_GS = np.zeros((CLASSES, freqs_KS.shape[1]))
    bits_GS[order] = np.where(freqs_KS > 0, 14 - np.log2(np.maximum(freqs_KS, 1)), 0.0)
    return CodedModels(
        Models(freqs_KS),
        place_G,
        cut,
        {
            "frequencies": ("U16", arrays["frequencies"]),
            "symbols": ("U8", arrays["symbols"]),
            "offsets": ("F16", offsets_K3),
        },
        bits_GS,
    )


def _largest(counts_S: npt.NDArray[np.float64]) -> int:
    seen = np.flatnonzero(counts_S)
    return (int(seen[-1]) + 1) // 2 if len(seen) else 0


@dataclass(frozen=True)
class StepsLayer:
    """One layer, decided.

    Attributes:
        codecs: one a tier.
        predictor: None without.
        stored: arrays for tables/bases.safetensors: name -> (dtype, array).
        analysis_DR: in the units of the stored arrays, but for the tier's step; in a file.
        tables: where classes round.
    """

    codecs: tuple[Steps, ...]
    predictor: Predictor | None
    stored: Stored
    analysis_DR: Tensor
    analysis_power: float
    tables: StepTables

    def working(self) -> dict[str, Tensor]:
        """Tensors the encoder takes; expanded anew at every call."""
        arrays = {name: array for name, (_, array) in self.stored.items()}
        wide = {
            name: torch.from_numpy(arrays[name].astype(np.float32)) for name in ("mean", "steps")
        }
        for codec in self.codecs:
            if codec.count:
                classes_C = arrays[codec.classes_name].astype(np.int64)
                wide[codec.classes_name] = torch.from_numpy(classes_C)
        if self.codecs[0].basis:
            wide["basis"] = torch.from_numpy(self.codecs[0].basis_rows(arrays))
            wide[ANALYSIS] = self.analysis_DR * self.analysis_power
        if self.predictor is not None:
            wide["predictor"] = torch.from_numpy(self.predictor.weights_DD(arrays))
        return wide | self.tables.to_shared()


def resolve_steps(fit: StepsFit, coded: CodedModels, width: int) -> StepsLayer:
    """Everything to store for one layer."""
    hadamard = fit.basis is None
    stored: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "mean": ("F16", (fit.mean_D * 2.0**-fit.exponent).numpy().astype(np.float16))
    }
    basis_runs: tuple[Run, ...] = ()
    step_T = fit.step_T * 2.0**-fit.exponent
    power = 1.0
    if hadamard:
        step_T = step_T * fit.unit_R[0]
    elif fit.basis is not None and len(fit.unit_R):
        basis_runs = runs_of(fit.basis_bits_R.tolist())
        scales_R = fit.basis.scales_R.numpy() * 2.0**fit.basis.exponent * fit.unit_R
        # Scales as large as f16 likes them; the step, in f32, takes the power of two off again.
        power = 2.0 ** (7 - np.floor(np.log2(scales_R.max())))
        stored["basis"] = ("U8", packed_rows(fit.basis.codes_RD, fit.basis_bits_R))
        stored["basis_scales"] = ("F16", (scales_R * power).astype(np.float16))
        step_T = step_T / power
    stored["steps"] = ("F32", step_T.astype(np.float32))
    codecs = []
    for tier, class_R in enumerate(fit.class_TR):
        coded_R = np.flatnonzero(class_R)
        count = int(coded_R[-1]) + 1 if len(coded_R) else 0
        fine_C = np.trim_zeros(fit.fine_TR[tier, :count], "b")
        codec = Steps(
            width,
            tier,
            len(fit.class_TR),
            count,
            basis_runs,
            fit.exponent,
            runs_of(fine_C.tolist()),
        )
        codecs.append(codec)
        if count:
            places = coded.place_G[fit.classes_of(tier, count)]
            stored[codec.classes_name] = ("U8", places.astype(np.uint8))
    predictor = stored_predictor(fit.predictor, fit.predictor_bits, stored)
    return StepsLayer(tuple(codecs), predictor, stored, fit.analysis_DR, 1 / power, coded.tables)
