"""Cross-entropy plus z-loss straight from hidden states, without the [N, V] logits in memory.

N positions, V vocabulary, D hidden. Logits live for one chunk of positions at a time, and their
gradient is taken while they are there, so memory does not grow with N or with V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK_POSITIONS", "ChunkRoom", "Loss", "lm_loss"]

# 262 MB of float32 logits at V = 128,256. With fewer, adding up the head's gradient, one [V, D] a
# chunk, takes longer than the matrix products.
CHUNK_POSITIONS = 512


@dataclass(frozen=True)
class Loss:
    """Sums over the positions of one call, float32 scalars.

    total: scale x (cross-entropy + z-loss; see distill_loss for the other), to call backward on.
    cross_entropy: sum of -log p(target) in nats, detached. z_loss: sum of weight x
    logsumexp(logits)^2, detached.
    kl: sum of KL(teacher || model) in nats, detached; None without a teacher.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    kl: Tensor | None = None


def lm_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    z_weight: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Loss:
    """Loss of predicting `targets_N` from `hidden_ND` through the head.

    Args:
        hidden_ND: final hidden states [N, D].
        head_VD: head weights [V, D] (the embedding when tied).
        targets_N: int64 [N], each below V.
        z_weight: weight of logsumexp^2 (paper, Table 3: 1e-6).
        scale: factor of `total`, normally 1 / positions of the whole optimiser step.
        dtype: of the matrix products; softmax and sums are float32.
    """
    total, cross_entropy, z_loss = _LmLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types
        hidden_ND, head_VD, targets_N, z_weight, scale, dtype
    )
    return Loss(total, cross_entropy, z_loss)


class _LmLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        z_weight: float,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = head_VD.detach().to(dtype)
        hidden = hidden_ND.detach().to(dtype)
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        cross_entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
        z_sum = torch.zeros_like(cross_entropy)
        room = ChunkRoom(head, min(len(hidden), CHUNK_POSITIONS), wants_head)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), CHUNK_POSITIONS):
                chunk = hidden[start : start + CHUNK_POSITIONS]
                target_n1 = targets_N[start : start + CHUNK_POSITIONS, None]
                logits = room.logits(chunk, head)
                picked_n1 = logits.gather(1, target_n1)
                # Softmax by hand, in place: torch's fused log_softmax is 3x slower on a CPU.
                top_n1 = logits.amax(1, keepdim=True)
                exponentials = logits.sub_(top_n1).exp_()
                sum_n1 = exponentials.sum(1, keepdim=True)
                lse_n1 = sum_n1.log() + top_n1
                cross_entropy += (lse_n1 - picked_n1).sum()
                z_sum += lse_n1.square().sum()
                if grad_hidden is None and grad_head is None:
                    continue
                # d total / d logits = scale x (p x (1 + 2 z lse) - onehot(target))
                grad = exponentials.mul_((1 + 2 * z_weight * lse_n1) * scale / sum_n1)
                grad.scatter_add_(1, target_n1, torch.full_like(lse_n1, -scale))
                grad = room.narrow(grad)
                if grad_hidden is not None:
                    grad_hidden[start : start + CHUNK_POSITIONS] = grad @ head
                if grad_head is not None:
                    room.add_product(grad_head, grad, chunk)
        ctx.grads = grad_hidden, grad_head
        ctx.head_dtype = head_VD.dtype
        z_loss = z_weight * z_sum
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return scale * (cross_entropy + z_loss), cross_entropy, z_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None  # scaled in place: one backward only
        outer = grads[0]
        return (
            None if grad_hidden is None else grad_hidden.mul_(outer),
            None if grad_head is None else grad_head.mul_(outer).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )


class ChunkRoom:
    """Buffers one chunk after the other is worked in: fresh pages cost more than the sums.

    n positions of a chunk; `wide` is float32, `narrow` the dtype of the products.
    """

    def __init__(self, head_VD: Tensor, positions: int, wants_head: bool) -> None:
        shape = positions, len(head_VD)
        self._wide = torch.empty(shape, dtype=torch.float32, device=head_VD.device)
        self._mixed = head_VD.dtype != torch.float32
        if self._mixed:
            self._narrow = torch.empty(shape, dtype=head_VD.dtype, device=head_VD.device)
        if self._mixed and wants_head:
            self._product = torch.empty_like(head_VD)
            self._wide_product = torch.empty_like(head_VD, dtype=torch.float32)

    def logits(self, chunk_nD: Tensor, head_VD: Tensor) -> Tensor:
        """chunk x head^T, float32 [n, V], to be overwritten freely."""
        wide = self._wide[: len(chunk_nD)]
        if not self._mixed:
            return torch.mm(chunk_nD, head_VD.T, out=wide)
        return wide.copy_(torch.mm(chunk_nD, head_VD.T, out=self._narrow[: len(chunk_nD)]))

    def narrow(self, values_nV: Tensor) -> Tensor:
        """Values in the dtype of the products."""
        return self._narrow[: len(values_nV)].copy_(values_nV) if self._mixed else values_nV

    def add_product(self, total_VD: Tensor, grad_nV: Tensor, chunk_nD: Tensor) -> None:
        """total += grad^T x chunk, summed in float32 (mutated)."""
        if not self._mixed:
            total_VD.addmm_(grad_nV.T, chunk_nD)
            return
        product = torch.mm(grad_nV.T, chunk_nD, out=self._product)
        total_VD.add_(self._wide_product.copy_(product))
