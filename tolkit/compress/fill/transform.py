"""The transform of one plane: mean, prediction from the embedding, and a basis ordered by variance.

D hidden, R rows of the basis; W sum of row weights. Everything here comes from weighted second
moments of [1, unit embedding, target], in float64; no row is looked at.

The basis is the Karhunen-Loeve transform of what the prediction leaves, taken in the metric of
the one reader that sees the running sum's error (LAB finding 4): coefficients are uncorrelated,
and a squared error of one costs `importance` times as much as the metric says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool, one_intra_op_thread

__all__ = [
    "Metric",
    "Moments",
    "Quantised",
    "Transform",
    "analysis_for",
    "fit_transform",
    "quantise_rows",
]

_RIDGE = 1e-4
_TINY = 1e-10
_METRIC_FLOOR = 0.01  # of the mean diagonal, LAB finding 4
_SOLVED_COLUMNS = 512  # each strip copies the factor


@dataclass(frozen=True)
class Quantised:
    """Rows as integer codes -m..m with m = 2^(bits-1) - 1, one f16 scale a row.

    Attributes:
        codes_RD: int8.
        scales_R: float64, each a number f16 holds.
        exponent: power of two that all values are multiplied by.
    """

    codes_RD: Tensor
    scales_R: Tensor
    exponent: int = 0

    @property
    def values_RD(self) -> Tensor:
        """What a reader makes of it: float64."""
        return self.codes_RD.double() * self.scales_R[:, None] * 2.0**self.exponent


def quantise_rows(rows_RD: Tensor, bits: Tensor | int) -> Quantised:
    """Round rows to `bits` bits (a number, or one a row), symmetric about zero."""
    exponent = _exponent(rows_RD.abs().flatten())
    rows_RD = rows_RD * 2.0**-exponent
    widths_R = torch.as_tensor(bits).expand(len(rows_RD))
    largest_R1 = (2.0 ** (widths_R.double() - 1) - 1)[:, None]
    scales_R1 = (rows_RD.abs().amax(dim=1, keepdim=True) / largest_R1).half().double()
    divisor = torch.where(scales_R1 > 0, scales_R1, 1.0)
    codes = (rows_RD / divisor).round().clamp(-largest_R1, largest_R1)
    return Quantised(codes.to(torch.int8), scales_R1[:, 0], exponent)


class Metric:
    """G^(1/2) and its inverse for a reader's Fisher metric G.

    Args:
        metric_DD: G; None where it is not known, which is the identity times `scale`.

    Attributes:
        root_DD, inverse_DD: float64; None where G is not known.
    """

    def __init__(self, metric_DD: Tensor | None, width: int, scale: float = 1.0) -> None:
        self.width, self.scale = width, scale
        self.root_DD: Tensor | None = None
        self.inverse_DD: Tensor | None = None
        if metric_DD is None:
            return
        floor = _METRIC_FLOOR * float(metric_DD.diagonal().double().mean()) or 1.0
        with one_intra_op_thread():
            values_D, vectors_DD = torch.linalg.eigh(metric_DD.double())
            values_D = values_D.clamp(min=0) + floor
            self.root_DD = (vectors_DD * values_D.sqrt()) @ vectors_DD.T
            self.inverse_DD = (vectors_DD / values_D.sqrt()) @ vectors_DD.T

    def move(self, place: Callable[[str], npt.NDArray[np.float64]]) -> None:
        """Keep the matrices in the arrays that `place` gives for their names."""
        for name in ("root_DD", "inverse_DD"):
            matrix_DD = getattr(self, name)
            if matrix_DD is not None:
                kept = place(name)
                kept[:] = matrix_DD.numpy()
                setattr(self, name, torch.from_numpy(kept))

    def rooted(self, rows_ND: Tensor, pool: BlockPool) -> Tensor:
        """rows @ G^(1/2)."""
        if self.root_DD is None:
            return rows_ND * math.sqrt(self.scale)
        return pool.product(rows_ND, self.root_DD)

    def unrooted(self, rows_ND: Tensor, pool: BlockPool) -> Tensor:
        """rows @ G^(-1/2)."""
        if self.inverse_DD is None:
            return rows_ND / math.sqrt(self.scale)
        return pool.product(rows_ND, self.inverse_DD)

    @property
    def mean_eigenvalue(self) -> float:
        """Of G: what a squared error costs in all directions alike."""
        if self.root_DD is None:
            return self.scale
        return float((self.root_DD**2).sum()) / self.width


@dataclass(frozen=True)
class Moments:
    """Weighted means and covariances of a plane's targets t and of unit embeddings u.

    Attributes:
        mean_t, mean_u: float64 [D].
        cov_tt, cov_ut, cov_uu: float64 [D, D]; those with u are None where nothing is predicted.
    """

    mean_t: Tensor
    cov_tt: Tensor
    mean_u: Tensor | None = None
    cov_ut: Tensor | None = None
    cov_uu: Tensor | None = None

    @staticmethod
    def of_sums(
        gram_tt: Tensor, gram_uu: Tensor | None = None, cross_ut: Tensor | None = None
    ) -> Moments:
        """From the weighted Gram matrices of [1, t] and [1, u], and the products u^T t.

        Raises:
            NonFiniteError: a sum overflowed.
        """
        mean_t, cov_tt = _mean_and_covariance(gram_tt)
        if gram_uu is None or cross_ut is None:
            return Moments(mean_t, cov_tt)
        mean_u, cov_uu = _mean_and_covariance(gram_uu)
        cov_ut = cross_ut / float(gram_tt[0, 0]) - mean_u[:, None] * mean_t
        return Moments(mean_t, cov_tt, mean_u, cov_ut, cov_uu)


def _mean_and_covariance(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of the columns after the first one, which is constant."""
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("weighted covariance: NaN or infinity")
    total = float(gram[0, 0])
    mean = gram[0, 1:] / total
    return mean, gram[1:, 1:] / total - mean[:, None] * mean


@dataclass(frozen=True)
class Transform:
    """How one plane becomes coefficients and back.

    Attributes:
        mean_D: float64, as f16 stores it (times 2^exponent).
        predictor: rounded weights [D out, D in], None without prediction.
        predictor_bits: 0 without.
        analysis_DR: coefficients = (target - mean - prediction) @ analysis.
        synthesis_RD: rows of norm 1, by falling importance times variance.
        importance_R: what a coefficient's squared error costs.
        variances_R: of the coefficients, over all rows.
        exponent: power of two of everything stored.
    """

    mean_D: Tensor
    predictor: Quantised | None
    predictor_bits: int
    analysis_DR: Tensor
    synthesis_RD: Tensor
    importance_R: Tensor
    variances_R: Tensor
    exponent: int


def fit_transform(
    moments: Moments, metric: Metric, predictor_bits: int, pool: BlockPool
) -> Transform:
    """The best transform for these targets in this metric.

    Args:
        predictor_bits: of the weights; 0 predicts nothing.
    """
    predictor, residual_DD = _predict(moments, predictor_bits, pool)
    inside_DD = metric.rooted(metric.rooted(residual_DD, pool).T, pool)
    with one_intra_op_thread():
        values_D, vectors_DD = torch.linalg.eigh(inside_DD)
    values_R, vectors_DR = values_D.flip(0).clamp(min=0), vectors_DD.flip(1)
    peak_1R = vectors_DR.abs().argmax(dim=0, keepdim=True)
    vectors_DR = vectors_DR * vectors_DR.gather(0, peak_1R).sign()
    synthesis_RD = metric.unrooted(vectors_DR.T, pool)
    norms_R = synthesis_RD.norm(dim=1)
    mean_D = moments.mean_t
    if predictor is not None and moments.mean_u is not None:
        mean_D = mean_D - predictor.values_RD @ moments.mean_u
    variances_R = values_R * norms_R**2
    exponent = _exponent(torch.cat([mean_D.abs(), variances_R.sqrt()]))
    scaled = (mean_D * 2.0**-exponent).half().double() * 2.0**exponent
    return Transform(
        mean_D=scaled,
        predictor=predictor,
        predictor_bits=predictor_bits if predictor is not None else 0,
        analysis_DR=metric.rooted(vectors_DR.T, pool).T * norms_R,
        synthesis_RD=synthesis_RD / norms_R[:, None],
        importance_R=1 / norms_R**2,
        variances_R=variances_R,
        exponent=exponent,
    )


def analysis_for(basis_RD: Tensor, metric: Metric, pool: BlockPool) -> Tensor:
    """Coefficients of targets in a rounded basis, by least squares in the metric: float64 [D, R].

    What rounding turned a row by, the other rows make up for as far as there are any.
    """
    costs_RD = metric.rooted(metric.rooted(basis_RD, pool), pool)
    gram_RR = pool.product(basis_RD, costs_RD.T)
    diagonal_R = gram_RR.diagonal()
    diagonal_R += _TINY * diagonal_R + _TINY * diagonal_R.sum()  # rows rounded to the same
    return _solved(gram_RR, costs_RD, pool).T


def _predict(moments: Moments, bits: int, pool: BlockPool) -> tuple[Quantised | None, Tensor]:
    """Least-squares weights rounded to `bits`, and the covariance of what they leave."""
    if not bits:
        return None, moments.cov_tt
    assert moments.cov_uu is not None and moments.cov_ut is not None
    width = len(moments.cov_tt)
    ridge = _RIDGE * float(moments.cov_uu.diagonal().mean()) + 1e-9
    eye = torch.eye(width, dtype=torch.float64)
    weights_DD = _solved(moments.cov_uu + ridge * eye, moments.cov_ut, pool)
    if not bool(weights_DD.any()) or not bool(torch.isfinite(weights_DD).all()):
        return None, moments.cov_tt
    quantised = quantise_rows(weights_DD.T.contiguous(), bits)
    rounded_DD = quantised.values_RD  # [out, in]
    cross_DD = pool.product(rounded_DD, moments.cov_ut)
    explained_DD = pool.product(pool.product(rounded_DD, moments.cov_uu), rounded_DD.T)
    residual = moments.cov_tt - cross_DD - cross_DD.T + explained_DD
    return quantised, (residual + residual.T) / 2


def _solved(matrix_DD: Tensor, right_DN: Tensor, pool: BlockPool) -> Tensor:
    """matrix^-1 @ right for a symmetric matrix, positive definite up to rounding."""
    with one_intra_op_thread():
        factor_DD, failed = torch.linalg.cholesky_ex(matrix_DD)
        if int(failed):
            solved_DN: Tensor = torch.linalg.solve(matrix_DD, right_DN)
            return solved_DN
    strips = [
        right_DN[:, n : n + _SOLVED_COLUMNS] for n in range(0, right_DN.shape[1], _SOLVED_COLUMNS)
    ]
    return torch.cat(pool.map(lambda strip: torch.cholesky_solve(strip, factor_DD), strips), dim=1)


def _exponent(magnitudes: Tensor) -> int:
    """Power of two that brings the largest magnitude to about 256, so that f16 serves."""
    largest = float(magnitudes.max()) if magnitudes.numel() else 0.0
    if largest <= 0:
        return 0
    return max(-120, min(120, int(torch.tensor(largest).log2().floor()) - 8))
