"""Tiers of tokens: runs of slots whose counts are alike, each with a record layout of its own."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_TIERS", "TierRange", "halved_ranges", "tier_ranges"]

MAX_TIERS = 8
_FEWEST_ROWS = 32

TierRange = tuple[int, int]
"""First slot and the one past the last."""


def tier_ranges(
    counts_by_slot_V: npt.NDArray[np.uint64] | None, num_rows: int, tiers: int = MAX_TIERS
) -> tuple[TierRange, ...]:
    """Cut slots (most frequent first) where log2(count + 1) crosses equal steps.

    Args:
        counts_by_slot_V: falling; None makes one tier of all rows.
        tiers: at most so many; groups of fewer than 32 rows join the one before.
    """
    if counts_by_slot_V is None or tiers == 1 or num_rows <= _FEWEST_ROWS:
        return ((0, num_rows),)
    level_V = np.log2(counts_by_slot_V.astype(np.float64) + 1)
    step = (level_V[0] - level_V[-1]) / tiers
    if step <= 0:
        return ((0, num_rows),)
    group_V = np.minimum((level_V - level_V[-1]) / step, tiers - 1).astype(np.int64)
    starts = [0, *(np.flatnonzero(np.diff(group_V)) + 1).tolist(), num_rows]
    ranges: list[TierRange] = []
    for first, stop in itertools.pairwise(starts):
        if ranges and min(stop - first, ranges[-1][1] - ranges[-1][0]) < _FEWEST_ROWS:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((first, stop))
    return tuple(ranges)


def halved_ranges(
    num_rows: int, finest_rows: float, tiers: int = MAX_TIERS
) -> tuple[TierRange, ...]:
    """Cut rows that are all alike in halves, quarters, eighths .. until one has `finest_rows`.

    A record grows by 16 bytes at a time, in all rows of a tier at once; with one tier a budget
    could only be filled to the next 16 bytes a token.
    """
    ranges: list[TierRange] = []
    first = 0
    while len(ranges) < tiers - 1 and (left := num_rows - first) > max(finest_rows, _FEWEST_ROWS):
        ranges.append((first, first + left // 2))
        first += left // 2
    return (*ranges, (first, num_rows))
