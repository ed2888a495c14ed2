"""Windows of like length side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.evaluate.windows import Window

__all__ = ["Batch", "batches", "padded"]


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


@dataclass(frozen=True)
class Batch:
    """What models read at once: R rows of T input tokens, N scored positions in them.

    inputs_RT: int64.     targets_N: int64, the token each position should predict.
    place_N: int64, each position's place in the flattened rows.
    window_N: the window each position belongs to.
    """

    inputs_RT: Tensor
    targets_N: Tensor
    place_N: Tensor
    window_N: npt.NDArray[np.int64]


def padded(windows: Sequence[Window], indices: Sequence[int]) -> Batch:
    """Some windows as one batch; `indices` are what `window_N` calls them.

    Windows that read the same tokens share a row (choices of one token differ in the target
    alone). Shorter rows are filled on the right with their own last input: a causal model's
    earlier positions do not see it, and no new distinct token appears.
    """
    longest = max(len(window.ids) for window in windows) - 1
    rows: dict[bytes, int] = {}
    inputs: list[npt.NDArray[np.int64]] = []
    places, targets = [], []
    for window in windows:
        read = window.ids[:-1]
        key = read.tobytes()
        if key not in rows:
            rows[key] = len(inputs)
            inputs.append(np.full(longest, read[-1], np.int64))
            inputs[-1][: len(read)] = read
        end = rows[key] * longest + len(read)
        places.append(np.arange(end - window.scored, end))
        targets.append(window.ids[len(window.ids) - window.scored :].astype(np.int64))
    return Batch(
        torch.from_numpy(np.stack(inputs)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(places)),
        np.repeat(np.asarray(indices, dtype=np.int64), [window.scored for window in windows]),
    )
