"""What caches of other policies would hit, simulated on a trace of rows; no reads, no bytes kept.

Each takes one row at a time, as decoding one text does, and answers with the number of hits.
Rows of a tier are numbered from 0, the most frequent first where counts are known.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

__all__ = ["SIMULATED", "lfu_hits", "lru_hits", "optimal_hits", "static_hits"]


def lru_hits(rows: Sequence[int], frames: int) -> int:
    """Hits of a cache that gives up what was used longest ago."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in rows:
        if row in held:
            hits += 1
            held.move_to_end(row)
            continue
        if len(held) == frames:
            held.popitem(last=False)
        held[row] = None
    return hits


def lfu_hits(rows: Sequence[int], frames: int) -> int:
    """Hits of a cache that gives up what was used least often; of equals, used longest ago.

    Uses are counted while a row is held, and forgotten with it.
    """
    uses: dict[int, tuple[int, int]] = {}
    queue: list[tuple[int, int, int]] = []
    hits = 0
    for tick, row in enumerate(rows):
        count = 0
        if row in uses:
            hits += 1
            count = uses[row][0]
        elif len(uses) == frames:
            while True:  # entries of rows used again since are out of date
                before, used, victim = heapq.heappop(queue)
                if uses.get(victim) == (before, used):
                    del uses[victim]
                    break
        uses[row] = count + 1, tick
        heapq.heappush(queue, (count + 1, tick, row))
    return hits


def static_hits(rows: Sequence[int], frames: int) -> int:
    """Hits of a cache that holds the first rows for ever."""
    return sum(row < frames for row in rows)


def optimal_hits(rows: Sequence[int], frames: int) -> int:
    """Hits of a cache that knows the future (Belady): it gives up what is needed last.

    No policy that takes in each row it reads and begins empty, as this one does, has more.
    """
    following = [len(rows)] * len(rows)
    latest: dict[int, int] = {}
    for at in range(len(rows) - 1, -1, -1):
        following[at] = latest.get(rows[at], len(rows))
        latest[rows[at]] = at
    held: dict[int, int] = {}
    queue: list[tuple[int, int]] = []
    hits = 0
    for at, row in enumerate(rows):
        if row in held:
            hits += 1
        elif len(held) == frames:
            while True:
                negative, victim = heapq.heappop(queue)
                if held.get(victim) == -negative:
                    del held[victim]
                    break
        held[row] = following[at]
        heapq.heappush(queue, (-following[at], row))
    return hits


SIMULATED: Mapping[str, Callable[[Sequence[int], int], int]] = MappingProxyType(
    {"lfu": lfu_hits, "static": static_hits, "optimal": optimal_hits}
)
"""Policies the runtime does not have; its own, ``seeded`` and ``lru``, are run, not simulated."""
