"""Cache policies against oracles that look at everything, on traces made by hand and at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from tolkit.bench.policies import SIMULATED, lfu_hits, lru_hits, optimal_hits, static_hits

Policy = Callable[[Sequence[int], int], int]
HAND_MADE = [0, 1, 2, 0, 0, 3, 1, 2, 0, 3]


@pytest.mark.parametrize(
    ("policy", "frames", "hits"),
    [
        # 2 frames: 0 | 0 1 | 1 2 | 2 0 | 0 hits | 0 3 | 3 1 | 1 2 | 2 0 | 0 3
        (lru_hits, 2, 1),
        # 3 frames: 0, 1, 2 read; 0, 0 hit; 3 for 1; 1 for 2; 2 for 0; 0 for 3; 3 for 1
        (lru_hits, 3, 2),
        (lru_hits, 4, 6),
        # 2 frames: 2 for 0, 0 for 1; 0 hit, so it stays; 3, 1, 2 pass; 0 hit
        (lfu_hits, 2, 2),
        (lfu_hits, 4, 6),
        (static_hits, 1, 4),
        (static_hits, 2, 6),
        (optimal_hits, 1, 1),
        (optimal_hits, 2, 3),
        (optimal_hits, 3, 5),
    ],
)
def test_hits_counted_by_hand(policy: Policy, frames: int, hits: int) -> None:
    assert policy(HAND_MADE, frames) == hits


def naive_lru(rows: Sequence[int], frames: int) -> int:
    hits = 0
    held: list[int] = []
    for row in rows:
        if row in held:
            hits += 1
            held.remove(row)
        held.append(row)
        held = held[-frames:]
    return hits


def naive_lfu(rows: Sequence[int], frames: int) -> int:
    hits = 0
    held: dict[int, list[int]] = {}
    for tick, row in enumerate(rows):
        if row in held:
            hits += 1
            held[row].append(tick)
            continue
        if len(held) == frames:
            del held[min(held, key=lambda r: (len(held[r]), held[r][-1]))]
        held[row] = [tick]
    return hits


def naive_optimal(rows: Sequence[int], frames: int) -> int:
    """The best over every choice of whom to give up, all of them tried."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for row in rows:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            if row in held:
                choices = [(held, hits + 1)]
            elif len(held) < frames:
                choices = [(held | {row}, hits)]
            else:
                kept = combinations(sorted(held), frames - 1)
                choices = [(frozenset(some) | {row}, hits) for some in kept]
            for state, count in choices:
                after[state] = max(count, after.get(state, 0))
        best = after
    return max(best.values())


ORACLES = {"lru": naive_lru, "lfu": naive_lfu, "optimal": naive_optimal}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 12])
def test_random_traces(name: str, frames: int) -> None:
    policy = {"lru": lru_hits, **SIMULATED}[name]
    for seed in range(8):
        random = np.random.default_rng(seed)
        rows = (random.zipf(1.3, 60) % 9).tolist()
        assert policy(rows, frames) == ORACLES[name](rows, frames)


def test_nobody_beats_the_one_that_knows_the_future() -> None:
    rows = (np.random.default_rng(0).zipf(1.2, 3000) % 400).tolist()
    best = optimal_hits(rows, 40)
    assert best > max(lru_hits(rows, 40), lfu_hits(rows, 40))


@pytest.mark.parametrize("policy", [lru_hits, lfu_hits, static_hits, optimal_hits])
def test_no_rows_and_one(policy: Policy) -> None:
    assert policy([], 3) == 0
    assert policy([5], 3) == 0
