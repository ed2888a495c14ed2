"""Pruning one weight matrix: by magnitude, Wanda, or SparseGPT.

W weight [O, I] (outputs, inputs), N input rows a layer saw on calibration text, H = X^T X [I, I]
with X [N, I] those rows. Every method sets exactly round(sparsity x O x I) weights to zero and
returns a new matrix. Sums and factorisations in float64.

- magnitude: the smallest |W| of the matrix.
- Wanda (Sun et al., arXiv 2306.11695): the smallest |W_oi| x ||X_i||_2 of each output's weights.
- SparseGPT (Frantar and Alistarh, arXiv 2301.00774): column by column, the weights whose loss
  costs least, W_oi^2 / [H^-1]_ii of the columns left; each loss is made up for by the weights to
  its right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["METHODS", "NEEDS_TEXT", "Pruner", "magnitude", "sparse_gpt", "wanda"]

Pruner = Callable[[Tensor, Tensor | None, float], Tensor]
"""(weight_OI, hessian_II or None, sparsity) -> pruned weight [O, I] in the weight's dtype."""

_DAMPING = 0.01
_COLUMNS = 128


def magnitude(weight_OI: Tensor, hessian_II: Tensor | None, sparsity: float) -> Tensor:
    """The smallest magnitudes of the whole matrix go; ties by position. No text is needed."""
    scores = weight_OI.abs().flatten()
    return _without(weight_OI, _lowest(scores, round(sparsity * len(scores))))


def wanda(weight_OI: Tensor, hessian_II: Tensor | None, sparsity: float) -> Tensor:
    """The smallest |W| x ||X||_2 of each output's weights go.

    Outputs lose equally many up to one, so that the matrix loses exactly its share.
    """
    assert hessian_II is not None
    norms_I = hessian_II.diagonal().clamp(min=0).sqrt()
    scores_OI = weight_OI.abs().double() * norms_I
    outputs, inputs = weight_OI.shape
    ends = [round(sparsity * inputs * (output + 1)) for output in range(outputs)]
    counts_O = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)])
    order_OI = scores_OI.argsort(dim=1, stable=True)
    rank_OI = torch.empty_like(order_OI)
    places_OI = torch.arange(inputs, device=order_OI.device).expand_as(order_OI)
    rank_OI.scatter_(1, order_OI, places_OI.contiguous())
    return _without(weight_OI, rank_OI < counts_O.to(rank_OI.device)[:, None])


def sparse_gpt(weight_OI: Tensor, hessian_II: Tensor | None, sparsity: float) -> Tensor:
    """Weights go column by column and those to the right make up for them.

    The choice is made for blocks of 128 columns at a time. Inputs that never were anything but
    zero lose their weights first, at no cost.
    """
    assert hessian_II is not None
    weight = weight_OI.double().clone()
    hessian = hessian_II.double().clone()
    outputs, inputs = weight.shape
    dead_I = hessian.diagonal() == 0
    hessian.diagonal()[dead_I] = 1.0
    weight[:, dead_I] = 0.0
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    factor_II = _inverse_factor(hessian)
    done = 0
    for first in range(0, inputs, _COLUMNS):
        stop = min(first + _COLUMNS, inputs)
        target = round(sparsity * outputs * stop)
        block_OB = weight[:, first:stop]
        diagonal_B = factor_II.diagonal()[first:stop]
        scores = ((block_OB / diagonal_B) ** 2).flatten()
        gone_OB = _lowest(scores, target - done).view_as(block_OB)
        done = target
        errors_OB = _clear_block(block_OB, gone_OB, factor_II[first:stop, first:stop])
        weight[:, stop:] -= errors_OB @ factor_II[first:stop, stop:]
    return weight.to(weight_OI.dtype)


def _clear_block(block_OB: Tensor, gone_OB: Tensor, factor_BB: Tensor) -> Tensor:
    """Zero what goes and move the rest of the block (mutated); what columns beyond must take."""
    errors_OB = torch.zeros_like(block_OB)
    for column in range(block_OB.shape[1]):
        lost_O = torch.where(gone_OB[:, column], block_OB[:, column], 0.0)
        errors_OB[:, column] = lost_O / factor_BB[column, column]
        block_OB[:, column:] -= errors_OB[:, column, None] * factor_BB[column, column:]
        block_OB[gone_OB[:, column], column] = 0.0
    return errors_OB


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper factor U with H^-1 = U^T U.

    Row i of U holds, up to its diagonal, what removing weight i asks of the weights to its right
    once all weights to its left are fixed: the inverse of the trailing part of H.
    """
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return upper


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Which of the flat scores are the `count` lowest; of equal ones the first."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.argsort(stable=True)[:count]] = True
    return chosen


def _without(weight_OI: Tensor, gone: Tensor) -> Tensor:
    return weight_OI.masked_fill(gone.view_as(weight_OI), 0.0)


METHODS: Mapping[str, Pruner] = MappingProxyType(
    {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparse_gpt}
)
NEEDS_TEXT = frozenset({"wanda", "sparsegpt"})
