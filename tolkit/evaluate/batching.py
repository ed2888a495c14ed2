"""Windows of like length side by side. B windows of a batch, T positions, N of them scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.evaluate.windows import Window

__all__ = ["batches", "padded"]


def batches(
    lengths: Sequence[int] | npt.NDArray[np.int64], indices: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Window indices in batches of about equal length, longest first; at least one a batch.

    Args:
        lengths: ids of every window; the model reads one less.
    """
    by_length = sorted(indices, key=lambda i: (-lengths[i], i))
    result: list[list[int]] = []
    room = 0
    for i in by_length:
        if room < 1:
            result.append([])
            room = max(1, batch_tokens // (int(lengths[i]) - 1))
        result[-1].append(i)
        room -= 1
    return result


def padded(
    windows: Sequence[Window], indices: Sequence[int]
) -> tuple[Tensor, Tensor, npt.NDArray[np.int64]]:
    """Ids int64 [B, T+1], which targets count bool [B, T], and each one's window index [N].

    Shorter windows are filled on the right with their own last id: a causal model's earlier
    positions do not see it, and no new distinct token appears.
    """
    longest = max(len(window.ids) for window in windows)
    ids_BT = np.empty((len(windows), longest), dtype=np.int64)
    scored_BT = np.zeros((len(windows), longest - 1), dtype=bool)
    for row, window in enumerate(windows):
        count = len(window.ids)
        ids_BT[row, :count] = window.ids
        ids_BT[row, count:] = window.ids[-1]
        scored_BT[row, count - 1 - window.scored : count - 1] = True
    window_N = np.repeat(np.asarray(indices, dtype=np.int64), [window.scored for window in windows])
    return torch.from_numpy(ids_BT), torch.from_numpy(scored_BT), window_N
