"""Windows spread evenly over a text. W windows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["spread_windows"]


def spread_windows(scored_W: npt.NDArray[np.int32], tokens: int) -> npt.NDArray[np.int64]:
    """Indices, ascending, of windows that score at most `tokens` positions together.

    Evenly spaced points are laid over the scored positions of the text and the windows they fall
    into are taken, so no part of the text and no length of document is preferred. All windows
    when they fit.

    Args:
        scored_W: positions each window scores, at least 1 and at most `tokens` each.
    """
    ends_W = np.cumsum(scored_W, dtype=np.int64)
    total, longest = int(ends_W[-1]), int(scored_W.max())
    assert 1 <= longest <= tokens
    if total <= tokens:
        return np.arange(len(scored_W))

    def hit(points: int) -> npt.NDArray[np.int64]:
        at = (2 * np.arange(points, dtype=np.int64) + 1) * total // (2 * points)
        return np.unique(np.searchsorted(ends_W, at, side="right"))

    fits, exceeds = tokens // longest, total  # a point for each position hits all windows
    while exceeds - fits > 1:
        points = (fits + exceeds) // 2
        if int(scored_W[hit(points)].sum(dtype=np.int64)) <= tokens:
            fits = points
        else:
            exceeds = points
    return hit(fits)
