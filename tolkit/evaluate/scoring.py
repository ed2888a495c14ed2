"""Large-vocabulary softmax in pieces: negative log-likelihood, KL divergence, top-1 agreement.

N positions, V vocabulary, D hidden. Logits exist only for one tile of positions x vocabulary at a
time, sized for a core's cache. Per position a running maximum, sum of exponentials and
exp-weighted difference are carried from tile to tile, so every head is multiplied once:

    lse  = m + log sum exp(l - m)
    KL(p || q) = sum_v p_v (l_v - k_v) - lse_l + lse_k        (l, k logits of p, q; nats)

Tiles are computed in float32, what is carried is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PositionScores", "Tile", "score_positions"]


@dataclass(frozen=True)
class Tile:
    """Positions x vocabulary entries whose logits exist at once."""

    positions: int = 256
    vocabulary: int = 2048

    @classmethod
    def for_device(cls, device: torch.device) -> Tile:
        """2 MiB of float32 on a CPU (second-level cache), 256 MiB elsewhere (launch cost)."""
        return cls() if device.type == "cpu" else cls(2048, 32768)


@dataclass(frozen=True)
class PositionScores:
    """Scores of N positions under one model; NaN where a logit is NaN or infinite.

    nll: float64 [N], negative log-likelihood of the target in nats.
    kl: float64 [N], KL(reference || this) in nats; None for the reference or without one.
    agrees: bool [N], this model's largest logit (ties included) is the reference's top token.
    flat: bool [N], all V logits are equal: the model says nothing here.
    greedy: bool [N], the target has the largest logit (ties included); False where NaN.
    """

    nll: Tensor
    kl: Tensor | None
    agrees: Tensor | None
    flat: Tensor
    greedy: Tensor


class _Carried:
    """What one model carries over the vocabulary, for n positions."""

    def __init__(self, targets_n: Tensor) -> None:
        def filled(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(targets_n.shape, value, dtype=dtype, device=targets_n.device)

        self.targets_n = targets_n
        self.largest_n = filled(-torch.inf, torch.float32)
        self.smallest_n = filled(torch.inf, torch.float32)
        self.target_logit_n = filled(torch.nan, torch.float32)
        self.sum_n = filled(0.0, torch.float64)
        # Against the reference: sum exp(l - m) (l - k), and the logit at the reference's top.
        self.cross_n = filled(0.0, torch.float64)
        self.at_top_n = filled(-torch.inf, torch.float32)

    def take_extremes(self, logits_nv: Tensor) -> Tensor:
        """Returns the factor [n] that brings earlier sums of exponentials to the new maximum."""
        before_n = self.largest_n
        self.largest_n = torch.maximum(before_n, logits_nv.amax(-1))
        self.smallest_n = torch.minimum(self.smallest_n, logits_nv.amin(-1))
        return torch.exp((before_n - self.largest_n).double())

    def take_target(self, logits_nv: Tensor, first: int) -> None:
        """Keep the target's logit where it lies in this tile, which starts at token `first`."""
        local_n = self.targets_n - first
        inside_n = (local_n >= 0) & (local_n < logits_nv.shape[1])
        index_n = local_n.clamp(0, logits_nv.shape[1] - 1)
        found_n = logits_nv.gather(1, index_n[:, None])[:, 0]
        self.target_logit_n = torch.where(inside_n, found_n, self.target_logit_n)

    def log_sum_exp(self) -> Tensor:
        """log sum exp of all logits [n], NaN where any was NaN or infinite."""
        finite_n = torch.isfinite(self.largest_n) & torch.isfinite(self.smallest_n)
        lse_n = self.largest_n.double() + torch.log(self.sum_n)
        return torch.where(finite_n, lse_n, torch.nan)


@torch.no_grad()
def score_positions(
    hidden_ND: Sequence[Tensor],
    heads_VD: Sequence[Tensor],
    targets_N: Tensor,
    *,
    with_reference: bool,
    tile: Tile | None = None,
) -> list[PositionScores]:
    """Score the same N positions under several models, the first being the reference or not.

    Args:
        hidden_ND: final hidden states of each model, same N.
        heads_VD: output weights of each model, same V, dtype of its hidden states.
        targets_N: int64, the token each position should predict.
        with_reference: compare every later model with the first.
        tile: how much is held at once; by default fitted to the device.
    """
    tile = tile or Tile.for_device(targets_N.device)
    size = tile.positions
    rows = [
        _score_rows(
            [hidden_nD[start : start + size] for hidden_nD in hidden_ND],
            heads_VD,
            targets_N[start : start + size],
            with_reference,
            tile.vocabulary,
        )
        for start in range(0, len(targets_N), size)
    ]
    return [_joined([row[model] for row in rows]) for model in range(len(hidden_ND))]


def _score_rows(
    hidden_nD: Sequence[Tensor],
    heads_VD: Sequence[Tensor],
    targets_n: Tensor,
    with_reference: bool,
    step: int,
) -> list[PositionScores]:
    count, vocabulary = len(targets_n), heads_VD[0].shape[0]
    models = [_Carried(targets_n) for _ in hidden_nD]
    # Reused for every tile: fresh pages for each would cost more than the arithmetic on them.
    buffers = torch.empty(
        (4, count * min(step, vocabulary)), dtype=torch.float32, device=targets_n.device
    )
    for first in range(0, vocabulary, step):
        width = min(step, vocabulary - first)
        ours_nv, exp_nv, theirs_nv, spare_nv = (
            flat[: count * width].view(count, width) for flat in buffers
        )
        if with_reference:
            reference = models[0]
            _multiply(hidden_nD[0], heads_VD[0][first : first + width], ours_nv)
            before_n = reference.largest_n
            rescale_n = reference.take_extremes(ours_nv)
            reference.take_target(ours_nv, first)
            top_n1 = ours_nv.argmax(-1, keepdim=True)
            improved_n = reference.largest_n > before_n
            torch.sub(ours_nv, reference.largest_n[:, None], out=exp_nv).exp_()
            reference.sum_n = reference.sum_n * rescale_n + exp_nv.sum(-1).double()
        for model in range(int(with_reference), len(models)):
            mine = models[model]
            _multiply(hidden_nD[model], heads_VD[model][first : first + width], theirs_nv)
            own_rescale_n = mine.take_extremes(theirs_nv)
            mine.take_target(theirs_nv, first)
            if with_reference:
                at_top_n = theirs_nv.gather(1, top_n1)[:, 0]
                mine.at_top_n = torch.where(improved_n, at_top_n, mine.at_top_n)
                torch.sub(ours_nv, theirs_nv, out=spare_nv).mul_(exp_nv)
                mine.cross_n = mine.cross_n * rescale_n + spare_nv.sum(-1).double()
            theirs_nv.sub_(mine.largest_n[:, None]).exp_()
            mine.sum_n = mine.sum_n * own_rescale_n + theirs_nv.sum(-1).double()
    reference_of = [models[0] if with_reference and i else None for i in range(len(models))]
    return [_finished(*pair) for pair in zip(models, reference_of, strict=True)]


def _multiply(hidden_nD: Tensor, head_vD: Tensor, out_nv: Tensor) -> None:
    """Logits of one tile in float32."""
    if hidden_nD.dtype == torch.float32:
        torch.mm(hidden_nD, head_vD.t(), out=out_nv)
    else:
        out_nv.copy_(torch.mm(hidden_nD, head_vD.t()))


def _finished(mine: _Carried, reference: _Carried | None) -> PositionScores:
    lse_n = mine.log_sum_exp()
    kl_n = agrees_n = None
    if reference is not None:
        kl_n = mine.cross_n / reference.sum_n - reference.log_sum_exp() + lse_n
        # A divergence is never negative; rounding (some 1e-7) can make a tiny one look so.
        kl_n = kl_n.clamp_min(0.0)
        agrees_n = mine.at_top_n >= mine.largest_n
    return PositionScores(
        nll=lse_n - mine.target_logit_n.double(),
        kl=kl_n,
        agrees=agrees_n,
        flat=mine.largest_n == mine.smallest_n,
        greedy=mine.target_logit_n >= mine.largest_n,
    )


def _joined(parts: Sequence[PositionScores]) -> PositionScores:
    def optional(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return PositionScores(
        nll=torch.cat([part.nll for part in parts]),
        kl=optional([part.kl for part in parts]),
        agrees=optional([part.agrees for part in parts]),
        flat=torch.cat([part.flat for part in parts]),
        greedy=torch.cat([part.greedy for part in parts]),
    )
