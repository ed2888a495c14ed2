"""Fitting codec `bands` to all planes of a source, layer by layer under error feedback.

V rows, D hidden, T tiers, R rows of a basis, S sampled rows.

For a price of a bit (lambda) one walk through the layers fits each transform to table plus carry,
measures the variance of its coefficients in every tier, quantises and passes the carry on. The
price that meets a budget is searched on a sample of rows; whole widths are then shared out
exactly with the variances of the last walk (see `allocate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.fill.allocate import LayerNeed, widths_at
from tolkit.compress.fill.lloyd import gaussian_codebook, lloyd_max
from tolkit.compress.fill.transform import Metric, Quantised, Transform, analysis_for, quantise_rows
from tolkit.compress.fill.walk import Coefficients, Rows, Walk
from tolkit.compress.spec import BandsWish
from tolkit.parallel import BlockPool

__all__ = ["BandsWalk", "LayerFit"]


@dataclass(frozen=True)
class LayerFit:
    """What one walk found for one layer.

    Attributes:
        mean_D: float64, real values.
        exponent: power of two that stored values are divided by.
        predictor: rounded weights [D out, D in]; None without.
        predictor_bits: of them.
        analysis_DR: float32, in a file; coefficients = (target - mean - prediction) @ analysis.
        basis: rows of norm 1, rounded; None for Hadamard.
        basis_bits_R: their widths.
        importance_R: what a squared error of a coefficient costs.
        variances_TR: of the coefficients in each tier.
        weight_T: of a row of each tier.
        books: a codebook for each width the walk gave, fitted to its coefficients.
    """

    mean_D: Tensor
    exponent: int
    predictor: Quantised | None
    predictor_bits: int
    analysis_DR: Tensor
    basis: Quantised | None
    basis_bits_R: npt.NDArray[np.int64]
    importance_R: npt.NDArray[np.float64]
    variances_TR: npt.NDArray[np.float64]
    weight_T: npt.NDArray[np.float64]
    books: Mapping[int, npt.NDArray[np.float64]]

    @property
    def need(self) -> LayerNeed:
        """For `allocate.fill`."""
        return LayerNeed(self.weight_T[:, None] * self.variances_TR * self.importance_R)

    def codebook(self, bits: int) -> npt.NDArray[np.float64]:
        """Values for coefficients of variance 1, as f16 holds them."""
        book = self.books.get(bits)
        return gaussian_codebook(bits).astype(np.float16).astype(float) if book is None else book


class BandsWalk(Walk[LayerFit]):
    """One pass through the layers; the arguments besides are `Walk`'s.

    Args:
        price: of a bit; 0 quantises nothing and passes no loss on, to learn variances.
    """

    def __init__(
        self, rows: Rows, wish: BandsWish, pool: BlockPool, *, price: float, feedback: bool
    ) -> None:
        super().__init__(rows, wish, pool, feedback=feedback)
        self.price = price

    def _fit(
        self, targets: npt.NDArray[np.generic], transform: Transform, metric: Metric
    ) -> LayerFit:
        weight_T = self._tier_weights()
        measured = self._measure(targets, transform)
        variances_TR = measured.variances_TR
        importance_R = transform.importance_R.numpy()
        worth_TR = weight_T[:, None] * variances_TR * importance_R
        basis, analysis_DR = None, transform.analysis_DR
        if self.wish.transform == "klt":
            keep, bits_R = self._basis_widths(worth_TR)
            basis = quantise_rows(transform.synthesis_RD[keep], torch.from_numpy(bits_R))
            analysis_DR = transform.analysis_DR[:, keep]
            if self.price:
                analysis_DR = analysis_for(basis.values_RD, metric, self.pool)
        else:
            keep = np.arange(len(importance_R))
            bits_R = np.zeros(len(keep), np.int64)
        widths_TR = widths_at(worth_TR[:, keep], self.price)
        fit = LayerFit(
            transform.mean_D,
            transform.exponent,
            transform.predictor,
            transform.predictor_bits,
            self._kept(analysis_DR.float()),
            basis,
            bits_R,
            importance_R[keep],
            variances_TR[:, keep],
            weight_T,
            _codebooks(measured, keep, widths_TR),
        )
        if self.feedback and self.price:
            synthesis_RD = transform.synthesis_RD if basis is None else basis.values_RD
            self._pass_carry(fit, targets, synthesis_RD.float(), widths_TR)
        return fit

    def _basis_widths(
        self, worth_TR: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which rows of the basis are in use, and their bits: 4, 6 or 8.

        A row's rounding is multiplied by its coefficient, so few bits serve coefficients of few.
        """
        most_R = widths_at(worth_TR, self.price).max(axis=0)
        bits_R = np.where(most_R >= 5, 8, np.where(most_R >= 3, 6, 4))
        keep = np.flatnonzero(most_R)
        return keep, bits_R[keep]

    def _pass_carry(
        self,
        fit: LayerFit,
        targets: npt.NDArray[np.generic],
        synthesis_RD: Tensor,
        widths_TR: npt.NDArray[np.int64],
    ) -> None:
        scales_TR = torch.from_numpy(np.sqrt(fit.variances_TR)).float()
        divisors_TR = torch.where(scales_TR > 0, scales_TR, 1.0)
        carry = self.rows.scratch(f"carry{self._layer % 2}")

        def step(block: tuple[int, int, int]) -> None:
            tier, first, stop = block
            residual_ND = self._spilled(targets, first, stop)
            units_NR = (residual_ND @ fit.analysis_DR).div_(divisors_TR[tier])
            values_NR = torch.zeros_like(units_NR)
            for bits in np.unique(widths_TR[tier]):
                if not bits:
                    continue
                columns = torch.from_numpy(np.flatnonzero(widths_TR[tier] == bits))
                book = torch.from_numpy(fit.codebook(int(bits))).float()
                edges = (book[1:] + book[:-1]) / 2
                codes = torch.bucketize(units_NR[:, columns], edges, out_int32=True)
                values_NR[:, columns] = book[codes]
            values_NR.mul_(scales_TR[tier])
            self._spill(carry, first, residual_ND - values_NR @ synthesis_RD)

        self.pool.map(step, self.rows.blocks())
        self._carry = carry


def _codebooks(
    measured: Coefficients, keep: npt.NDArray[np.int64], widths_TR: npt.NDArray[np.int64]
) -> dict[int, npt.NDArray[np.float64]]:
    """One codebook a width in use, fitted to the coefficients of that width over their scales."""
    scales_TR = np.sqrt(measured.variances_TR[:, keep])
    scales_SR = np.where(scales_TR > 0, scales_TR, 1.0)[measured.tier_S]
    units_SR = measured.samples_SR[:, keep] / scales_SR
    width_SR = widths_TR[measured.tier_S]
    return {
        int(bits): lloyd_max(units_SR[width_SR == bits], int(bits)).astype(np.float16).astype(float)
        for bits in np.unique(widths_TR)
        if bits
    }
