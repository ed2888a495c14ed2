"""Rows of different lengths in one batch: what each position sees and where it stands.

B batch, T new positions, S positions so far (the new ones included).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["positions_of", "visible_positions"]


def visible_positions(mask_BS: Tensor, length: int) -> Tensor:
    """Which positions each of the last `length` attends to: bool [B, 1, T, S].

    Those up to itself that `mask_BS` marks with a nonzero value. Padding attends to itself: a
    position that sees nothing would be NaN.
    """
    seen = mask_BS.shape[1]
    key_S = torch.arange(seen, device=mask_BS.device)
    query_T1 = key_S[seen - length :, None]
    real_BTS = (key_S <= query_T1) & (mask_BS != 0)[:, None]
    return (real_BTS | (key_S == query_T1))[:, None]


def positions_of(mask_BS: Tensor, length: int) -> Tensor:
    """Rotary positions of the last `length`: how many tokens of the row come before, [B, T]."""
    counted_BS = (mask_BS != 0).long().cumsum(-1) - 1
    return counted_BS.clamp_(min=0)[:, mask_BS.shape[1] - length :]
