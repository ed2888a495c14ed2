"""One optimiser step: forward, backward, accumulation over micro-batches.

The token FFN of a memory block sees only token ids, so it runs once per optimiser step, over the
distinct ids of all micro-batches, forward and backward; micro-batches read its rows and leave
their gradients there. The result is the gradient of the whole batch, exactly.

B windows of a step, T positions, n distinct ids, L layers, D hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.model import Decoder, RowSource, SharedRows
from tolkit.train.distill import Teacher, distill_loss, head_of
from tolkit.train.loss import Loss, lm_loss

__all__ = ["StepLoss", "accumulate_gradients", "mean_loss"]

_KEPT_ACTIVATION_BYTES = 4 << 30


@dataclass(frozen=True)
class StepLoss:
    """Means over the positions of a step, in nats; distinct_ids counts the table rows.

    kl: KL(teacher || model), None without a teacher.
    """

    cross_entropy: float
    z_loss: float
    distinct_ids: int
    kl: float | None = None


def accumulate_gradients(
    model: Decoder,
    windows_BS: Tensor,
    *,
    micro_batch: int,
    z_weight: float,
    dtype: torch.dtype,
    rows: RowSource | None = None,
    teacher: Teacher | None = None,
) -> StepLoss:
    """Add to `.grad` the gradient of the mean loss over `windows_BS` (int64 [B, T + 1]).

    Args:
        micro_batch: windows of one forward pass.
        z_weight: weight of the z-loss.
        dtype: of the matrix products.
        rows: table rows that take no gradient; None for the model's own FFN.
        teacher: model to learn from as well, None for the text alone.
    """
    inputs_BT, targets_BT = windows_BS[:, :-1], windows_BS[:, 1:]
    positions = targets_BT.numel()
    starts = range(0, len(windows_BS), micro_batch)
    cross_entropy = torch.zeros((), device=windows_BS.device)
    z_loss, kl = torch.zeros_like(cross_entropy), torch.zeros_like(cross_entropy)
    ids_n = torch.unique(inputs_BT)
    shared: SharedRows | None = None
    # A context of its own: autocast may cache weights cast without gradient (recompute).
    with _products_in(dtype, windows_BS.device):
        if rows is None and model.config.has_tables and len(starts) > 1:
            shared = SharedRows(model, ids_n, recompute=_needs_recompute(model, len(ids_n)))
    with _products_in(dtype, windows_BS.device):
        for start in starts:
            part = slice(start, start + micro_batch)
            hidden_BTD = model.hidden(inputs_BT[part], rows=rows or shared)
            loss = _loss_of(
                model,
                hidden_BTD.reshape(-1, model.config.hidden_size),
                targets_BT[part].reshape(-1),
                teacher,
                None if teacher is None else teacher.hidden(inputs_BT[part]),
                z_weight=z_weight,
                scale=1.0 / positions,
                dtype=dtype,
            )
            loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            cross_entropy += loss.cross_entropy
            z_loss += loss.z_loss
            if loss.kl is not None:
                kl += loss.kl
        if shared is not None:
            shared.backward()
    return StepLoss(
        cross_entropy.item() / positions,
        z_loss.item() / positions,
        len(ids_n),
        None if teacher is None else kl.item() / positions,
    )


def _loss_of(
    model: Decoder,
    hidden_ND: Tensor,
    targets_N: Tensor,
    teacher: Teacher | None,
    wanted_NC: Tensor | None,
    *,
    z_weight: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype,
) -> Loss:
    """The loss of final hidden states; `wanted_NC` are the teacher's."""
    head_VD = head_of(model)
    if teacher is None or wanted_NC is None:
        return lm_loss(hidden_ND, head_VD, targets_N, z_weight=z_weight, scale=scale, dtype=dtype)
    return distill_loss(
        hidden_ND,
        head_VD,
        wanted_NC,
        head_of(teacher.model),
        targets_N,
        weight=teacher.weight,
        z_weight=z_weight,
        scale=scale,
        dtype=dtype,
    )


def _needs_recompute(model: Decoder, distinct_ids: int) -> bool:
    """Whether keeping all layers' FFN activations would take too much memory."""
    config = model.config
    values = 2 * config.hidden_size + 3 * config.memory_intermediate_size
    return 4 * values * distinct_ids * config.num_hidden_layers > _KEPT_ACTIVATION_BYTES


@torch.no_grad()
def mean_loss(
    model: Decoder,
    windows_BS: Tensor,
    *,
    dtype: torch.dtype,
    rows: RowSource | None = None,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Means over each window of `windows_BS` (int64 [B, T + 1]), in nats, float32 [B].

    Returns:
        -log p of the targets; KL(teacher || model), None without a teacher.
    """
    inputs_BT, targets_BT = windows_BS[:, :-1], windows_BS[:, 1:]
    length = targets_BT.shape[1]
    losses, divergences = [], []
    with _products_in(dtype, windows_BS.device):
        hidden_BTD = model.hidden(inputs_BT, rows=rows)
        wanted_BTC = None
        if teacher is not None:
            wanted_BTC = teacher.hidden(inputs_BT).reshape(*inputs_BT.shape, -1)
        for i in range(len(windows_BS)):
            wanted_TC = None if wanted_BTC is None else wanted_BTC[i]
            loss = _loss_of(model, hidden_BTD[i], targets_BT[i], teacher, wanted_TC, dtype=dtype)
            losses.append(loss.cross_entropy / length)
            if loss.kl is not None:
                divergences.append(loss.kl / length)
    return torch.stack(losses), torch.stack(divergences) if divergences else None


def _products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
