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
from tolkit.train.loss import lm_loss

__all__ = ["StepLoss", "accumulate_gradients", "mean_loss"]

_KEPT_ACTIVATION_BYTES = 4 << 30


@dataclass(frozen=True)
class StepLoss:
    """Means over the positions of a step, in nats; distinct_ids counts the FFN's rows."""

    cross_entropy: float
    z_loss: float
    distinct_ids: int


def accumulate_gradients(
    model: Decoder, windows_BS: Tensor, *, micro_batch: int, z_weight: float, dtype: torch.dtype
) -> StepLoss:
    """Add to `.grad` the gradient of the mean loss over `windows_BS` (int64 [B, T + 1]).

    Args:
        micro_batch: windows of one forward pass.
        z_weight: weight of the z-loss.
        dtype: of the matrix products.
    """
    inputs_BT, targets_BT = windows_BS[:, :-1], windows_BS[:, 1:]
    positions = targets_BT.numel()
    starts = range(0, len(windows_BS), micro_batch)
    cross_entropy = torch.zeros((), device=windows_BS.device)
    z_loss = torch.zeros_like(cross_entropy)
    ids_n = torch.unique(inputs_BT)
    shared: SharedRows | None = None
    # A context of its own: autocast may cache weights cast without gradient (recompute).
    with _products_in(dtype, windows_BS.device):
        if model.config.has_tables and len(starts) > 1:
            shared = SharedRows(model, ids_n, recompute=_needs_recompute(model, len(ids_n)))
    with _products_in(dtype, windows_BS.device):
        for start in starts:
            part = slice(start, start + micro_batch)
            hidden_ND = _hidden(model, inputs_BT[part], shared)
            loss = lm_loss(
                hidden_ND,
                _head(model),
                targets_BT[part].reshape(-1),
                z_weight=z_weight,
                scale=1.0 / positions,
                dtype=dtype,
            )
            loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            cross_entropy += loss.cross_entropy
            z_loss += loss.z_loss
        if shared is not None:
            shared.backward()
    return StepLoss(cross_entropy.item() / positions, z_loss.item() / positions, len(ids_n))


def _needs_recompute(model: Decoder, distinct_ids: int) -> bool:
    """Whether keeping all layers' FFN activations would take too much memory."""
    config = model.config
    values = 2 * config.hidden_size + 3 * config.memory_intermediate_size
    return 4 * values * distinct_ids * config.num_hidden_layers > _KEPT_ACTIVATION_BYTES


@torch.no_grad()
def mean_loss(model: Decoder, windows_BS: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Mean -log p in nats of each window's targets: float32 [B]. `windows_BS` int64 [B, T + 1]."""
    with _products_in(dtype, windows_BS.device):
        hidden_ND = _hidden(model, windows_BS[:, :-1], None)
        width = windows_BS.shape[1] - 1
        means = [
            lm_loss(
                hidden_ND[i * width : (i + 1) * width],
                _head(model),
                windows_BS[i, 1:],
                dtype=dtype,
            ).cross_entropy
            / width
            for i in range(len(windows_BS))
        ]
    return torch.stack(means)


def _products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _hidden(model: Decoder, ids_BT: Tensor, rows: RowSource | None) -> Tensor:
    return model.hidden(ids_BT, rows=rows).reshape(-1, model.config.hidden_size)


def _head(model: Decoder) -> Tensor:
    return model.embedding if model.lm_head is None else model.lm_head.weight
