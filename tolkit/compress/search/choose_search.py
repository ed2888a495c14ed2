"""Ways to a set of layers that costs little together: add, put back, exchange.

A step evaluates all its candidate sets and takes the one of the lowest KL, so it needs no
assumption on how costs of layers combine. A layer that is added goes to the side where its table
cost less alone; exchanges try the other side as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tolkit.compress.search.bound import Bound
from tolkit.compress.search.choose_measure import Gone, Meter, SetCost, Side
from tolkit.errors import UsageError

__all__ = [
    "DropWish",
    "Search",
    "Step",
    "backward",
    "better",
    "exchanges",
    "forward",
    "search_sets",
    "sets_of_one",
]

Search = Literal["forward", "backward", "auto"]


@dataclass(frozen=True)
class DropWish:
    """Which layers to choose: a number of them, or as many as a bound allows. One of the three.

    Attributes:
        auto: how many.
        max_kl: bound on the mean KL divergence from the reference, in nats.
        max_ppl_increase: bound on the change of token perplexity, a ratio: 0.004 is 0.4 %.
        fold: add a table that goes to the next kept one or the previous, whichever costs less
            (False: the paper's plain drop).
        search: ``forward`` adds layers, ``backward`` puts them back, ``auto`` does both, refines
            the better set by exchanges and takes it.

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
        self.bound  # noqa: B018  raises for a bound that is none

    @property
    def bound(self) -> Bound | None:
        """The bound to meet, None where their number is given."""
        return None if self.auto is not None else Bound(self.max_kl, self.max_ppl_increase)

    def allows(self, cost: SetCost) -> bool:
        """Whether a set of this cost meets the bound; always without one."""
        bound = self.bound
        if bound is None:
            return True
        metric = cost.kl_nats if bound.metric == "kl_mean_nats" else cost.ppl_increase
        return bound.holds(metric.interval[1])

    def most(self, kept: int) -> int:
        """The largest number of `kept` layers it may choose: one has to stay."""
        return kept - 1 if self.auto is None else self.auto


@dataclass(frozen=True)
class Step:
    """One step of a search.

    Attributes:
        search: ``forward``, ``backward`` or ``exchange``.
        candidates: every set that was compared, the cheapest first.
        taken: the set the search went on with; None where it ended without one of them.
    """

    search: str
    candidates: tuple[SetCost, ...]
    taken: SetCost | None


def better(costs: Sequence[SetCost]) -> SetCost:
    """The set that saves most, of those the one with the lowest KL."""
    return min(costs, key=lambda cost: (-len(cost.layers), *_rank(cost)))


def sets_of_one(kept: Sequence[int], *, fold: bool) -> list[dict[int, Side]]:
    """Each of the kept layers alone, to each side where there is another one."""
    if not fold:
        return [{layer: "next"} for layer in kept]
    sets: list[dict[int, Side]] = []
    for layer in kept:
        sets += [{layer: "previous"}] if layer != kept[0] else []
        sets += [{layer: "next"}] if layer != kept[-1] else []
    return sets


def search_sets(
    meter: Meter, wish: DropWish, alone: Sequence[SetCost]
) -> tuple[list[Step], dict[str, SetCost]]:
    """All steps of the searches the wish names, and the set each of them ended with.

    Args:
        alone: the costs of `sets_of_one`; at least one of them the wish allows.
    """
    by_cost = sorted(alone, key=_rank)
    sides = {cost.layers[0]: cost.sides[cost.layers[0]] for cost in reversed(by_cost)}
    steps: list[Step] = []
    found: dict[str, SetCost] = {}
    if wish.search != "backward":
        steps += forward(meter, wish, sides)
        _keep_last(found, "forward", steps)
    if wish.search != "forward":
        least = len(found["forward"].layers) if found else 1
        start = _start(wish, by_cost, least)
        back = backward(meter, wish, {layer: sides[layer] for layer in start}, least)
        _keep_last(found, "backward", back)
        steps += back
    if wish.search == "auto":
        exchanged = exchanges(meter, wish, sides, better(list(found.values())))
        if wish.auto is None and _taken(exchanged):
            # A cheaper set of the same size may have room for one more layer.
            exchanged += forward(meter, wish, sides, _taken(exchanged)[-1].sides)
        _keep_last(found, "exchange", exchanged)
        steps += exchanged
    return steps, found


def forward(
    meter: Meter, wish: DropWish, sides: Gone, start: Mapping[int, Side] | None = None
) -> list[Step]:
    """Add the layer that costs least beside those already chosen, until enough or too much.

    Args:
        sides: of every kept layer, where its table goes when it is added.
        start: the set to begin with; by default none.
    """
    steps: list[Step] = []
    chosen, most = dict(start or {}), wish.most(len(meter.kept))
    while len(chosen) < most:
        sets = [{**chosen, layer: sides[layer]} for layer in meter.kept if layer not in chosen]
        left = sum(len(meter.kept) - n for n in range(len(chosen) + 1, most))
        step = _step("forward", meter, wish, sets, left)
        steps.append(step)
        if step.taken is None:
            break
        chosen = {k: chosen.get(k, sides[k]) for k in step.taken.layers}
    return steps


def backward(meter: Meter, wish: DropWish, start: Gone, least: int) -> list[Step]:
    """Put back the layer whose return helps most, until few enough or cheap enough.

    Args:
        start: where to begin, too many layers or too dear.
        least: with a bound, sets of fewer layers are not looked for.
    """
    steps: list[Step] = []
    chosen, stop = dict(start), least if wish.auto is None else wish.auto
    if wish.auto is None or len(chosen) == stop:
        steps.append(_step("backward", meter, wish, [chosen], 0))
        if steps[0].taken is not None:
            return steps
    while len(chosen) > stop:
        sets = [{k: v for k, v in chosen.items() if k != layer} for layer in chosen]
        step = _step("backward", meter, wish, sets, sum(range(stop + 1, len(chosen))))
        steps.append(step)
        if wish.auto is None and step.taken is not None:
            break
        chosen = {k: chosen[k] for k in step.candidates[0].layers}
    return steps


def exchanges(meter: Meter, wish: DropWish, sides: Gone, start: SetCost) -> list[Step]:
    """Change one layer at a time while that helps: its table's side, or for a neighbour."""
    steps: list[Step] = []
    best = start
    while sets := _neighbours(meter, sides, best):
        step = _step("exchange", meter, wish, sets, 0)
        if step.taken is None or _rank(step.taken) >= _rank(best):
            return [*steps, Step("exchange", step.candidates, None)]
        best = step.taken
        steps.append(step)
    return steps


def _step(search: str, meter: Meter, wish: DropWish, sets: Sequence[Gone], then: int) -> Step:
    """Compare sets of one size; taken is the cheapest that the wish allows."""
    size = len(sets[0])
    label = f"{search}, {size} layer{'s' if size > 1 else ''}"
    costs = sorted(meter.costs(sets, label, then), key=_rank)
    return Step(search, tuple(costs), next((cost for cost in costs if wish.allows(cost)), None))


def _neighbours(meter: Meter, sides: Gone, of: SetCost) -> list[dict[int, Side]]:
    """Every set with one chosen layer's table to the other side, or its neighbour chosen instead.

    Two of them may mean the same sums; they are evaluated once.
    """
    sets: list[dict[int, Side]] = []
    kept, chosen = meter.kept, of.sides
    for layer, side in chosen.items():
        if meter.fold:
            sets.append({**chosen, layer: "next" if side == "previous" else "previous"})
        place = kept.index(layer)
        for other in kept[max(0, place - 1) : place + 2]:
            if other not in chosen:
                rest = {k: v for k, v in chosen.items() if k != layer}
                sets.append({**rest, other: sides[other]})
    return sets


def _start(wish: DropWish, by_cost: Sequence[SetCost], least: int) -> list[int]:
    """Where going backward begins: the layers that cost least alone, more than will go."""
    layers = list(dict.fromkeys(cost.layers[0] for cost in by_cost))
    size = 2 * (wish.auto or least)
    if wish.auto is None and wish.search == "backward":
        size = len({cost.layers[0] for cost in by_cost if wish.allows(cost)})
    return sorted(layers[: min(size, len(layers) - 1)])


def _keep_last(found: dict[str, SetCost], name: str, steps: list[Step]) -> None:
    """Note the last set a search took, where it took one."""
    taken = _taken(steps)
    if taken:
        found[name] = taken[-1]


def _taken(steps: list[Step]) -> list[SetCost]:
    return [step.taken for step in steps if step.taken is not None]


def _rank(cost: SetCost) -> tuple[float, list[tuple[int, int]]]:
    """By KL; equal ones by their layers, so that equal runs choose alike."""
    into = [(layer, -1 if to is None else to) for layer, to in cost.into.items()]
    return cost.kl_nats.value, into
