"""Fitting codec `steps`: one step for all coefficients in the metric, symbols for an entropy coder.

V rows, D hidden, T tiers, R rows of a basis, P symbols of a row, G classes, M magnitudes.

At a high rate a uniform step and an entropy coder lose a quarter of a bit to the best possible
quantiser at any variance, so nothing has to be shared out: the squared error a bit removes is the
same everywhere when the step, in the metric and weighted by the tier, is. That one number, `scale`,
decides everything here: which coefficients are worth coding, which rows of the basis they need in
how many bits, and the symbols. A coefficient's model is the class of its deviation in steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.codecs.steps import StepTables, quantised_steps
from tolkit.compress.fill.step_classes import (
    CLASSES,
    FINE_CLASS,
    GRID,
    MAX_MAGNITUDE,
    PRICE,
    class_of,
    fine_bits,
    fine_for_peaks,
    kept_rows,
    wider_units,
)
from tolkit.compress.fill.transform import Metric, Quantised, Transform, analysis_for, quantise_rows
from tolkit.compress.fill.walk import Rows, Walk
from tolkit.compress.spec import BandsWish
from tolkit.parallel import BlockPool

__all__ = ["StepsFit", "StepsWalk", "Symbols", "tables_of"]

_MAGNITUDES = MAX_MAGNITUDE + 1
_ENOUGH = 256  # symbols that say something about a class

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass
class Symbols:
    """What a walk counted.

    Attributes:
        counts_TGS: of symbols, by tier and class, of all rows of the source.
        layer_counts: the same by layer, all tiers together.
        short_G3: summed distance of coefficients from their magnitude in steps, for magnitudes
            1, 2 and more; `found_G3` is of how many.
    """

    counts_TGS: Floats
    layer_counts: list[Floats] = field(default_factory=list)
    short_G3: Floats = field(default_factory=lambda: np.zeros((CLASSES, 3)))
    found_G3: Floats = field(default_factory=lambda: np.zeros((CLASSES, 3)))


@dataclass(frozen=True)
class StepsFit:
    """What one walk found for one layer.

    Attributes:
        mean_D, exponent, predictor, predictor_bits: as `LayerFit`.
        analysis_DR: float32, in a file; (target - mean - prediction) @ analysis, divided by the
            tier's step, is what is rounded.
        basis: rows of norm 1, rounded; None for Hadamard.
        basis_bits_R: their widths.
        unit_R: factor of each basis row.
        step_T: of each tier.
        worth_TR: weight x importance x variance of every component, coded or not.
        class_TR: class of the components that have a row of the basis.
        fine_TR: bits their second symbols add, 0 where there is none.
    """

    mean_D: Tensor
    exponent: int
    predictor: Quantised | None
    predictor_bits: int
    analysis_DR: Tensor
    basis: Quantised | None
    basis_bits_R: Integers
    unit_R: Floats
    step_T: Floats
    worth_TR: Floats
    class_TR: Integers
    fine_TR: Integers

    def classes_of(self, tier: int, count: int) -> Integers:
        """Of the symbols of the first `count` components: their first ones, then the second."""
        fine_C = self.fine_TR[tier, :count]
        return np.concatenate([self.class_TR[tier, :count], FINE_CLASS + fine_C[fine_C > 0]])


class StepsWalk(Walk[StepsFit]):
    """One pass through the layers at one scale; the arguments besides are `Walk`'s.

    Args:
        scale: the step in the metric for a row of weight 1; None passes no loss on and codes
            nothing, to learn variances.
        tables: thresholds and reconstruction, of the walk before.

    Attributes:
        symbols: what was counted so far.
    """

    def __init__(
        self,
        rows: Rows,
        wish: BandsWish,
        pool: BlockPool,
        *,
        scale: float | None,
        tables: StepTables,
        feedback: bool,
    ) -> None:
        super().__init__(rows, wish, pool, feedback=feedback)
        self.scale, self.tables = scale, tables
        self.symbols = Symbols(np.zeros((len(rows.ranges), CLASSES, 2 * _MAGNITUDES)))

    def _fit(
        self, targets: npt.NDArray[np.generic], transform: Transform, metric: Metric
    ) -> StepsFit:
        weight_T = self._tier_weights()
        measured = self._measure(targets, transform)
        # Everything in the metric: a squared coefficient is what an error of its size costs.
        scale_TR = np.sqrt(weight_T)[:, None] * np.sqrt(transform.importance_R.numpy())
        worth_TR = scale_TR**2 * measured.variances_TR
        fit = self._decided(transform, worth_TR, scale_TR * measured.peaks_TR, weight_T, metric)
        if self.scale is not None:
            synthesis_RD = transform.synthesis_RD if fit.basis is None else fit.basis.values_RD
            scaled_RD = (synthesis_RD * torch.from_numpy(fit.unit_R)[:, None]).float()
            self._quantise(fit, targets, scaled_RD)
        return fit

    def _decided(
        self,
        transform: Transform,
        worth_TR: Floats,
        peaks_TR: Floats,
        weight_T: Floats,
        metric: Metric,
    ) -> StepsFit:
        scale = self.scale or math.inf
        ratio_TR = np.sqrt(worth_TR) / scale
        keep = np.arange(worth_TR.shape[1])
        bits_R = np.zeros(len(keep), np.int64)
        if self.wish.transform == "klt":
            keep, bits_R = kept_rows(ratio_TR, np.array(self.rows.tier_rows), worth_TR.shape[1])
        basis, analysis_DR = None, transform.analysis_DR
        if self.wish.transform == "klt":
            basis = quantise_rows(transform.synthesis_RD[keep], torch.from_numpy(bits_R))
            analysis_DR = analysis_for(basis.values_RD, metric, self.pool)
        tier_rows = np.array(self.rows.tier_rows)
        peaks_TR = peaks_TR[:, keep] / scale
        factor_R = np.ones(len(keep))
        if basis is not None:  # whose rows carry it
            factor_R = wider_units(peaks_TR, int(tier_rows.sum()))
        unit_R = factor_R / np.sqrt(transform.importance_R.numpy()[keep])
        if basis is not None:
            unit_R = _storable(unit_R, basis.scales_R.numpy())
        ratio_TR = ratio_TR[:, keep] / factor_R
        fine_TR = fine_for_peaks(fine_bits(ratio_TR), peaks_TR / factor_R, tier_rows)
        class_TR = np.maximum(class_of(ratio_TR / 2.0**fine_TR), fine_TR > 0)
        return StepsFit(
            transform.mean_D,
            transform.exponent,
            transform.predictor,
            transform.predictor_bits,
            self._kept((analysis_DR / torch.from_numpy(unit_R)).float()),
            basis,
            bits_R,
            unit_R,
            np.ones(len(weight_T)) if self.scale is None else scale / np.sqrt(weight_T),
            worth_TR,
            class_TR,
            fine_TR,
        )

    def _quantise(self, fit: StepsFit, targets: npt.NDArray[np.generic], scaled_RD: Tensor) -> None:
        carry = self.rows.scratch(f"carry{self._layer % 2}")
        steps = torch.from_numpy(fit.step_T).float()
        count = fit.class_TR.shape[1]
        classes_TP = [torch.from_numpy(fit.classes_of(t, count)) for t in range(len(steps))]

        def step(block: tuple[int, int, int]) -> tuple[int, Floats, Floats, Floats]:
            tier, first, stop = block
            residual_ND = self._spilled(targets, first, stop)
            units_NR = residual_ND @ fit.analysis_DR / steps[tier]
            symbols_NP, values_NR = quantised_steps(
                units_NR, classes_TP[tier], torch.from_numpy(fit.fine_TR[tier]), self.tables
            )
            if self.feedback:
                lost_ND = residual_ND - (values_NR * steps[tier]) @ scaled_RD
                self._spill(carry, first, lost_ND)
            one_R = fit.fine_TR[tier] == 0
            counts = _counts(symbols_NP.numpy(), classes_TP[tier].numpy())
            short = _short(symbols_NP.numpy(), units_NR.numpy(), fit.class_TR[tier], one_R)
            return (tier, counts, *short)

        layer_counts = np.zeros((CLASSES, 2 * _MAGNITUDES))
        for tier, counts, short, found in self.pool.map(step, self.rows.blocks()):
            first, stop = self.rows.ranges[tier]
            share = self.rows.tier_rows[tier] / (stop - first)
            self.symbols.counts_TGS[tier] += share * counts
            layer_counts += share * counts
            self.symbols.short_G3 += share * short
            self.symbols.found_G3 += share * found
        self.symbols.layer_counts.append(layer_counts)
        if self.feedback:
            self._carry = carry


def _storable(unit_R: Floats, scales_R: Floats) -> Floats:
    """Units whose products with the basis' scales f16 holds exactly, but for powers of two.

    Rounding the product later would be an error of up to one in 2^11 of coefficients that can be
    16,000 steps.
    """
    fraction_R, exponent_R = np.frexp(unit_R * scales_R)
    product_R = np.ldexp(np.round(fraction_R * 2**11), exponent_R - 11)
    return np.where(scales_R > 0, product_R / np.where(scales_R > 0, scales_R, 1), unit_R)


def _counts(symbols_NP: npt.NDArray[np.uint8], class_P: Integers) -> Floats:
    """How often each symbol of each class stands there: [G, 2 M]."""
    flat = (symbols_NP + class_P * 2 * _MAGNITUDES).reshape(-1)
    counts = np.bincount(flat, minlength=CLASSES * 2 * _MAGNITUDES)
    return counts.reshape(CLASSES, -1).astype(np.float64)


def _short(
    symbols_NP: npt.NDArray[np.uint8],
    units_NR: npt.NDArray[np.float32],
    class_R: Integers,
    one_R: npt.NDArray[np.bool_],
) -> tuple[Floats, Floats]:
    """`Symbols.short_G3` and `found_G3` of coefficients of one symbol."""
    rows, columns = np.nonzero(symbols_NP[:, : len(class_R)] * one_R)
    magnitude = (symbols_NP[rows, columns].astype(np.int64) + 1) // 2
    place = class_R[columns] * 3 + np.minimum(magnitude, 3) - 1
    short = magnitude - np.abs(units_NR[rows, columns].astype(np.float64))
    sums = np.asarray(np.bincount(place, short, minlength=3 * CLASSES), np.float64)
    found = np.bincount(place, minlength=3 * CLASSES).astype(np.float64)
    return sums.reshape(CLASSES, 3), found.reshape(CLASSES, 3)


def tables_of(symbols: Symbols | None) -> StepTables:
    """Thresholds and reconstruction for the next walk from what the last one counted.

    A magnitude is taken where its squared error and PRICE times its bits are least, and read as
    the mean of what took it.
    """
    zero_G, shift_G = np.full(CLASSES, 0.6), np.full(CLASSES, 0.1)
    offsets_G3 = np.zeros((CLASSES, 3))
    largest_G = np.full(CLASSES, _MAGNITUDES - 1)
    largest_G[0] = 0
    if symbols is not None:
        few_G3 = symbols.found_G3 < _ENOUGH
        means = symbols.short_G3 / np.maximum(symbols.found_G3, 1)
        offsets_G3 = np.where(few_G3, 0.0, np.clip(means, -0.25, 0.45))
        offsets_G3 = offsets_G3.astype(np.float16).astype(np.float64)
        zero_G, shift_G = _thresholds(symbols.counts_TGS.sum(axis=0), offsets_G3)
    zero_G[GRID:], shift_G[GRID:] = 0.5, 0.0  # what is left by a first symbol is evenly spread
    return StepTables(
        torch.from_numpy(zero_G).float(),
        torch.from_numpy(shift_G).float(),
        torch.from_numpy(largest_G).float(),
        torch.from_numpy(offsets_G3).float(),
    )


def _thresholds(counts_GS: Floats, offsets_G3: Floats) -> tuple[Floats, Floats]:
    """Where 0 gives way to 1, and how much later than in the middle larger magnitudes begin."""
    by_magnitude = np.concatenate(
        [counts_GS[:, :1], (counts_GS[:, 1:-1:2] + counts_GS[:, 2::2]) / 2], axis=1
    )
    total_G = counts_GS.sum(axis=1)
    bits = -np.log2((by_magnitude[:, :3] + 0.5) / (total_G + 1)[:, None])
    values = np.arange(3) - np.concatenate([np.zeros((CLASSES, 1)), offsets_G3[:, :2]], axis=1)
    apart = np.diff(values, axis=1)
    starts = (values[:, 1:] + values[:, :-1]) / 2 + PRICE * np.diff(bits, axis=1) / (2 * apart)
    known = total_G >= _ENOUGH
    zero_G = np.where(known, np.clip(starts[:, 0], 0.5, 0.98), 0.6)
    shift_G = np.where(known, np.clip(starts[:, 1] - 1.5, 0.0, 0.4), 0.1)
    few = by_magnitude[:, 2] < _ENOUGH
    shift_G = np.where(few & known, np.minimum(zero_G - 0.5, 0.4), shift_G)
    return zero_G, shift_G
