"""Ways to a set of layers that costs little together: add, put back, exchange.

K layers that have a table. A step evaluates all its candidate sets and takes the one of the
lowest KL, so it needs no assumption on how costs of layers combine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tolkit.compress.choose_measure import LayerSet, Meter, SetCost
from tolkit.errors import UsageError

__all__ = [
    "DropWish",
    "Search",
    "Step",
    "backward",
    "better",
    "forward",
    "search_sets",
    "swapped",
]

Search = Literal["forward", "backward", "auto"]


@dataclass(frozen=True)
class DropWish:
    """Which layers to choose: a number of them, or as many as a bound allows. One of the three.

    Attributes:
        auto: how many.
        max_kl: bound on the mean KL divergence from the reference, in nats.
        max_ppl_increase: bound on the change of token perplexity, a ratio: 0.004 is 0.4 %.
        fold: add a table that goes to the next kept one (False: the paper's plain drop).
        search: ``forward`` adds layers, ``backward`` puts them back, ``auto`` does both, refines
            the better set and takes it.

    A bound holds when the upper end of the two-sided 95 % interval meets it, as a gate of
    `tol eval` passes.
    """

    auto: int | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    fold: bool = True
    search: Search = "auto"

    def __post_init__(self) -> None:
        given = [self.auto, self.max_kl, self.max_ppl_increase]
        if sum(value is not None for value in given) != 1:
            raise UsageError("auto: give exactly one of auto, max_kl and max_ppl_increase")
        if self.auto is not None and self.auto < 1:
            raise UsageError(f"auto: expected at least 1 layer, got {self.auto}")
        for name, bound in (("max_kl", self.max_kl), ("max_ppl_increase", self.max_ppl_increase)):
            if bound is not None and not 0 < bound < float("inf"):
                raise UsageError(f"{name}: expected a finite bound above 0, got {bound}")

    def allows(self, cost: SetCost) -> bool:
        """Whether a set of this cost meets the bound; always without one."""
        if self.max_kl is not None:
            return cost.kl_nats.interval[1] <= self.max_kl
        if self.max_ppl_increase is not None:
            return cost.ppl_increase.interval[1] <= self.max_ppl_increase
        return True

    def most(self, kept: int) -> int:
        """The largest number of `kept` layers it may choose: one has to stay."""
        return kept - 1 if self.auto is None else self.auto


@dataclass(frozen=True)
class Step:
    """One step of a search.

    Attributes:
        search: ``forward``, ``backward`` or ``swap``.
        candidates: every set that was compared, the cheapest first.
        taken: the set the search went on with; None where it ended without one of them.
    """

    search: str
    candidates: tuple[SetCost, ...]
    taken: SetCost | None


def better(costs: Sequence[SetCost]) -> SetCost:
    """The set that saves most, of those the one with the lowest KL."""
    return min(costs, key=lambda cost: (-len(cost.layers), *_rank(cost)))


def search_sets(
    meter: Meter, wish: DropWish, alone: Sequence[SetCost]
) -> tuple[list[Step], dict[str, SetCost]]:
    """All steps of the searches the wish names, and the set each of them ended with.

    Args:
        alone: each kept layer's cost; at least one of them the wish allows.
    """
    steps: list[Step] = []
    found: dict[str, SetCost] = {}
    if wish.search != "backward":
        steps += forward(meter, wish)
        _keep_last(found, "forward", steps)
    if wish.search != "forward":
        least = len(found["forward"].layers) if found else 1
        back = backward(meter, wish, _start(meter, wish, alone, least), least)
        _keep_last(found, "backward", back)
        steps += back
    if wish.search == "auto":
        exchanged = swapped(meter, wish, better(list(found.values())))
        if wish.auto is None and exchanged and exchanged[0].taken is not None:
            # A cheaper set of the same size may have room for one more layer.
            exchanged += forward(meter, wish, better(_taken(exchanged)).layers)
        _keep_last(found, "swap", exchanged)
        steps += exchanged
    return steps, found


def forward(meter: Meter, wish: DropWish, start: LayerSet = ()) -> list[Step]:
    """Add the layer that costs least beside those already chosen, until enough or too much."""
    steps: list[Step] = []
    chosen, most = start, wish.most(len(meter.kept))
    while len(chosen) < most:
        sets = [(*chosen, layer) for layer in meter.kept if layer not in chosen]
        left = sum(len(meter.kept) - n for n in range(len(chosen) + 1, most))
        step = _step("forward", meter, wish, sets, len(chosen) + 1, left)
        steps.append(step)
        if step.taken is None:
            break
        chosen = step.taken.layers
    return steps


def backward(meter: Meter, wish: DropWish, start: LayerSet, least: int) -> list[Step]:
    """Put back the layer whose return helps most, until few enough or cheap enough.

    Args:
        start: where to begin, too many layers or too dear.
        least: with a bound, sets of fewer layers are not looked for.
    """
    steps: list[Step] = []
    chosen, stop = start, least if wish.auto is None else wish.auto
    if wish.auto is None or len(chosen) == stop:
        step = _step("backward", meter, wish, [start], len(start), 0)
        steps.append(step)
        if step.taken is not None:
            return steps
    while len(chosen) > stop:
        sets = [tuple(k for k in chosen if k != layer) for layer in chosen]
        left = sum(range(stop + 1, len(chosen)))
        step = _step("backward", meter, wish, sets, len(chosen) - 1, left)
        steps.append(step)
        if wish.auto is None and step.taken is not None:
            break
        chosen = step.candidates[0].layers
    return steps


def swapped(meter: Meter, wish: DropWish, start: SetCost) -> list[Step]:
    """Exchange a chosen layer with the kept layer just before or after it while that helps."""
    steps: list[Step] = []
    best = start
    while True:
        sets = _neighbours(meter.kept, best.layers)
        if not sets:
            return steps
        costs = sorted(meter.costs(sets, f"swap {len(steps) + 1}"), key=_rank)
        found = next((cost for cost in costs if wish.allows(cost)), None)
        if found is None or _rank(found) >= _rank(best):
            return [*steps, Step("swap", tuple(costs), None)]
        best = found
        steps.append(Step("swap", tuple(costs), best))


def _step(
    search: str, meter: Meter, wish: DropWish, sets: Sequence[LayerSet], size: int, then: int
) -> Step:
    """Compare sets of `size` layers; taken is the cheapest that the wish allows."""
    label = f"{search}, {size} layer{'s' if size > 1 else ''}"
    costs = sorted(meter.costs(sets, label, then), key=_rank)
    return Step(search, tuple(costs), next((cost for cost in costs if wish.allows(cost)), None))


def _neighbours(kept: Sequence[int], chosen: LayerSet) -> list[LayerSet]:
    """Every set with one chosen layer moved to the next kept one, on either side."""
    sets = []
    for layer in chosen:
        place = kept.index(layer)
        for other in kept[max(0, place - 1) : place + 2]:
            if other not in chosen:
                sets.append(tuple(sorted(other if k == layer else k for k in chosen)))
    return sets


def _rank(cost: SetCost) -> tuple[float, LayerSet]:
    """By KL; equal ones by their layers, so that equal runs choose alike."""
    return cost.kl_nats.value, cost.layers


def _start(meter: Meter, wish: DropWish, alone: Sequence[SetCost], least: int) -> LayerSet:
    """Where going backward begins: the layers that cost least alone, more than will go."""
    by_cost = [c.layers[0] for c in sorted(alone, key=lambda c: (c.kl_nats.value, c.layers))]
    size = 2 * (wish.auto or least)
    if wish.auto is None and wish.search == "backward":
        size = sum(wish.allows(cost) for cost in alone)
    return tuple(sorted(by_cost[: min(size, len(meter.kept) - 1)]))


def _keep_last(found: dict[str, SetCost], name: str, steps: list[Step]) -> None:
    """Note the last set a search took, where it took one."""
    taken = _taken(steps)
    if taken:
        found[name] = taken[-1]


def _taken(steps: list[Step]) -> list[SetCost]:
    return [step.taken for step in steps if step.taken is not None]
