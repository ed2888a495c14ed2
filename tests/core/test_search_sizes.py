"""The search for a size on known curves, against trying every size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from tolkit.compress.search.sizes import TOLERANCE, bracket, next_size

FLOOR, TOP, START = 1_000, 80_000, 10_000


def search(excess_at: Callable[[int], float]) -> dict[int, float]:
    """Every size tried, in order."""
    tried: dict[int, float] = {}
    while (size := next_size(tried, floor=FLOOR, top=TOP, start=START)) is not None:
        assert size not in tried
        assert FLOOR <= size <= TOP
        tried[size] = excess_at(size)
        assert len(tried) < 40
    return tried


def smallest_of_all(excess_at: Callable[[int], float]) -> int | None:
    return next((size for size in range(FLOOR, TOP + 1) if excess_at(size) <= 0), None)


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_what_trying_every_size_finds(seed: int) -> None:
    rng = random.Random(seed)
    slope, bend = rng.uniform(2, 5), rng.uniform(-0.3, 0.3)
    root = math.exp(rng.uniform(math.log(1.1 * FLOOR), math.log(0.9 * TOP)))
    step = rng.choice([1, 1, 400])

    def excess_at(size: int) -> float:
        distance = math.log(max(size // step * step, 1) / root)
        return -(slope * distance + bend * distance * abs(distance))

    tried = search(excess_at)
    failing, holding = bracket(tried)
    want = smallest_of_all(excess_at)
    assert want is not None and holding is not None and failing is not None
    assert want <= holding <= want * (1 + TOLERANCE) + 1
    assert tried[failing] > 0


def test_a_straight_line_takes_few_sizes() -> None:
    counts = [
        len(search(lambda size, root=root: -3.2 * math.log(size / root)))
        for root in (2_000, 5_000, 9_000, 15_000, 30_000)
    ]
    assert max(counts) <= 5


def test_a_bound_that_always_holds_ends_at_the_floor() -> None:
    tried = search(lambda size: -7.0)
    assert min(tried) == FLOOR
    assert bracket(tried) == (None, FLOOR)


def test_a_bound_that_never_holds_ends_at_the_top() -> None:
    for excess in (7.0, math.inf):
        tried = search(lambda size, excess=excess: excess)
        assert max(tried) == TOP
        assert bracket(tried) == (TOP, None)


def test_measurements_that_contradict_each_other_still_end() -> None:
    rng = random.Random(5)
    tried = search(lambda size: -3 * math.log(size / 20_000) + rng.uniform(-1, 1))
    failing, holding = bracket(tried)
    assert failing is not None and holding is not None
    assert tried[holding] <= 0 < tried[failing]
    assert holding <= failing * (1 + TOLERANCE)


def test_known_sizes_are_started_from() -> None:
    known = {9_900: 0.01, 10_050: -0.01}
    assert next_size(known, floor=FLOOR, top=TOP, start=START) is None
    size = next_size({9_000: 0.35, 12_000: -0.6}, floor=FLOOR, top=TOP, start=START)
    assert size is not None and 9_000 < size < 12_000
