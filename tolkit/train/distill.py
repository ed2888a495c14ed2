"""Learning from another model's probabilities instead of, or beside, the text's next tokens.

N positions, n of a chunk, V vocabulary, D hidden, C hidden of the teacher, B batch, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolkit.model import Decoder, RowSource
from tolkit.train import loss as loss_module
from tolkit.train.loss import ChunkRoom, Loss

__all__ = ["Teacher", "distill_loss", "head_of"]


@dataclass(frozen=True)
class Teacher:
    """The model to learn from, on the device of the one that learns; nothing of it changes.

    rows: its table rows, None for a dense one. weight: share of KL in the loss. identity: digest
    of what it is.
    """

    model: Decoder
    rows: RowSource | None
    weight: float
    identity: str

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states [B T, C]."""
        return self.model.hidden(ids_BT, rows=self.rows).reshape(-1, self.model.config.hidden_size)


def head_of(model: Decoder) -> Tensor:
    """Head weights [V, D]: the embedding where they are tied."""
    return model.embedding if model.lm_head is None else model.lm_head.weight


def distill_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher_NC: Tensor,
    teacher_head_VC: Tensor,
    targets_N: Tensor,
    *,
    weight: float = 1.0,
    z_weight: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Loss:
    """weight x KL(teacher || model) + (1 - weight) x cross-entropy + z-loss, logits never whole.

    Works as `lm_loss`, whose arguments the others are, with three buffers of one chunk's logits
    instead of one (786 MB at V = 128,256). Softmax and sums are float32.

    Args:
        teacher_NC: the teacher's final hidden states; no gradient goes there.
        teacher_head_VC: its head, V as the model's.
    """
    total, cross_entropy, z_loss, kl = _DistillLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types
        hidden_ND, head_VD, teacher_NC, teacher_head_VC, targets_N, weight, z_weight, scale, dtype
    )
    return Loss(total, cross_entropy, z_loss, kl)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher_NC: Tensor,
        teacher_head_VC: Tensor,
        targets_N: Tensor,
        weight: float,
        z_weight: float,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, hidden = head_VD.detach().to(dtype), hidden_ND.detach().to(dtype)
        teacher_head, teacher = teacher_head_VC.detach().to(dtype), teacher_NC.detach().to(dtype)
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        size = loss_module.CHUNK_POSITIONS
        positions = min(len(hidden), size)
        room = ChunkRoom(head, positions, wants_head)
        teacher_room = ChunkRoom(teacher_head, positions, False)
        spare = torch.empty(positions, len(head), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                chunk = hidden[start : start + size]
                target_n1 = targets_N[start : start + size, None]
                logits = room.logits(chunk, head)
                wanted = teacher_room.logits(teacher[start : start + size], teacher_head)
                p_nV, kl_n1, lse_n1, ce_n1 = _compare(logits, wanted, target_n1, spare)
                sums += torch.stack([ce_n1.sum(), lse_n1.square().sum(), kl_n1.sum()])
                if grad_hidden is None and grad_head is None:
                    continue
                # d total / d logits = scale x (p x (1 + 2 z lse) - w q - (1 - w) onehot(target))
                grad = p_nV.mul_((1 + 2 * z_weight * lse_n1) * scale)
                grad.add_(wanted, alpha=-scale * weight)
                grad.scatter_add_(1, target_n1, torch.full_like(lse_n1, -scale * (1 - weight)))
                grad = room.narrow(grad)
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = grad @ head
                if grad_head is not None:
                    room.add_product(grad_head, grad, chunk)
        ctx.grads = grad_hidden, grad_head
        ctx.head_dtype = head_VD.dtype
        cross_entropy, z_loss, kl = sums[0].clone(), z_weight * sums[1], sums[2].clone()
        ctx.mark_non_differentiable(cross_entropy, z_loss, kl)
        total = scale * (weight * kl + (1 - weight) * cross_entropy + z_loss)
        return total, cross_entropy, z_loss, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None  # scaled in place: one backward only
        outer = grads[0]
        return (
            None if grad_hidden is None else grad_hidden.mul_(outer),
            None if grad_head is None else grad_head.mul_(outer).to(ctx.head_dtype),
            *(None,) * 7,
        )


def _compare(
    logits_nV: Tensor, wanted_nV: Tensor, target_n1: Tensor, spare_NV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities p [n, V], KL(q || p), logsumexp and cross-entropy, each [n, 1].

    Mutated: p takes the place of the logits, q that of the teacher's; `spare_NV` is room to work.
    """
    picked_n1 = logits_nV.gather(1, target_n1)
    top_n1 = logits_nV.amax(1, keepdim=True)
    logits_nV.sub_(top_n1)
    wanted_nV.sub_(wanted_nV.amax(1, keepdim=True))
    difference_nV = torch.sub(wanted_nV, logits_nV, out=spare_NV[: len(logits_nV)])
    q_nV, p_nV = wanted_nV.exp_(), logits_nV.exp_()
    q_sum_n1, p_sum_n1 = q_nV.sum(1, keepdim=True), p_nV.sum(1, keepdim=True)
    q_nV.div_(q_sum_n1)
    # sum q (log q - log p), where log q - log p = difference - log q_sum + log p_sum
    kl_n1 = difference_nV.mul_(q_nV).sum(1, keepdim=True) - q_sum_n1.log() + p_sum_n1.log()
    lse_n1 = p_sum_n1.log() + top_n1
    return p_nV.div_(p_sum_n1), kl_n1, lse_n1, lse_n1 - picked_n1
