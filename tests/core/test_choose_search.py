"""Choosing layers without a model: wishes, receivers, and searches whose costs are told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tolkit.compress.fold import drop
from tolkit.compress.search.choose import DropWish, most_evaluations, parse_bound
from tolkit.compress.search.choose_measure import Gone, SetCost, receivers
from tolkit.compress.search.choose_search import search_sets, sets_of_one
from tolkit.errors import UsageError
from tolkit.evaluate.result import Metric
from tolkit_formats.manifest import LayerStatus


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "auto: give exactly one of"),
        ({"auto": 1, "max_kl": 0.1}, "auto: give exactly one of"),
        ({"auto": 0}, "auto: expected at least 1 layer"),
        ({"max_kl": 0.0}, "max_kl: expected a finite bound above 0"),
        ({"max_ppl_increase": math.inf}, "max_ppl_increase: expected a finite bound"),
        ({"max_kl": math.nan}, "max_kl: expected a finite bound"),
    ],
)
def test_wishes_that_make_no_sense(wish: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        DropWish(**wish)


@pytest.mark.parametrize(
    ("kept", "previous", "following", "expected"),
    [
        ((0, 1, 2, 3), (), (3,), {3: 2}),  # a tail has nothing after it
        ((0, 1, 2, 3), (0,), (), {0: 1}),  # nor a head before it
        ((0, 1, 2, 3), (), (1, 2), {1: 3, 2: 3}),
        ((0, 1, 2, 3), (1, 2), (), {1: 0, 2: 0}),
        ((0, 1, 2, 3), (1,), (2,), {1: 0, 2: 3}),
        ((0, 1, 2, 3), (2,), (1,), {1: 0, 2: 3}),  # would cross
        ((0, 2, 3), (), (2, 3), {2: 0, 3: 0}),
        ((0, 1, 2, 3, 4, 5), (4,), (1, 2), {1: 3, 2: 3, 4: 3}),
    ],
)
def test_tables_go_to_the_nearest_kept_layer_and_never_cross(
    kept: tuple[int, ...],
    previous: tuple[int, ...],
    following: tuple[int, ...],
    expected: dict[int, int],
) -> None:
    gone = dict.fromkeys(previous, "previous") | dict.fromkeys(following, "next")
    assert receivers(kept, gone) == expected  # type: ignore[arg-type]
    if not previous:
        statuses = [LayerStatus("kept" if i in kept else "dropped") for i in range(6)]
        after = drop(statuses, following, fold=True, option="layers")
        assert {layer: after[layer].into for layer in following} == expected


@pytest.mark.parametrize(
    ("layers", "into", "fold", "said"),
    [
        ((1,), {2: 3}, True, r"receivers are given for layers \[2\], expected \[1\]"),
        ((1, 2), {1: 0}, True, "receivers are given for layers"),
        ((1, 2), {1: 2, 2: 3}, True, r"layer 1 is folded into 2, expected one of \[0, 3\]"),
        ((1,), {1: 9}, True, "layer 1 is folded into 9"),
        ((1,), {1: 0}, False, "expected none, their tables are dropped"),
    ],
)
def test_receivers_that_cannot_be(layers: tuple, into: dict, fold: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        drop([LayerStatus("kept")] * 4, layers, fold=fold, option="layers", into=into)


def test_bounds_are_read_as_gates_are() -> None:
    assert parse_bound("0.4%", "max_ppl_increase") == 0.004
    assert parse_bound("0.004", "max_ppl_increase") == 0.004
    assert parse_bound("1e-3", "max_kl") == 0.001
    for text_, name in (
        ("0.4%", "max_kl"),
        ("much", "max_kl"),
        ("", "max_ppl_increase"),
        ("baseline+1%", "max_ppl_increase"),
        ("1GB", "max_kl"),
    ):
        with pytest.raises(UsageError, match=f"{name}: .* is not a bound"):
            parse_bound(text_, name)


def test_evaluations_are_stated_before() -> None:
    assert most_evaluations(12, DropWish(auto=4, search="forward")) == 22 + 11 + 10 + 9
    assert most_evaluations(12, DropWish(auto=4, search="backward")) == 22 + 8 + 7 + 6 + 5
    assert most_evaluations(12, DropWish(auto=2, fold=False, search="forward")) == 12 + 11
    assert most_evaluations(3, DropWish(auto=2)) == 4 + 2 + 1
    assert most_evaluations(4, DropWish(max_kl=1.0, search="forward")) == 6 + 3 + 2


class Told:
    """A meter of six layers whose costs are told by a table; plain drops."""

    kept = tuple(range(6))
    fold = False

    def __init__(self, kls: dict[tuple[int, ...], float]) -> None:
        self.kls = kls

    def costs(self, sets: list[Gone], label: str, then: int = 0) -> list[SetCost]:
        return [self.cost(tuple(sorted(gone))) for gone in sets]

    def cost(self, layers: tuple[int, ...]) -> SetCost:
        kl = Metric(self.kls.get(layers, 10.0 * len(layers)), 0.0, 100)
        return SetCost(dict.fromkeys(layers), kl, kl)


def searched(kls: dict[tuple[int, ...], float], wish: DropWish) -> dict[str, tuple[int, ...]]:
    meter: Any = Told(kls)
    alone = [meter.cost((layer,)) for layer in meter.kept]
    _, found = search_sets(meter, wish, alone)
    return {name: cost.layers for name, cost in found.items()}


ALONE = {(0,): 1.0, (1,): 2.0, (2,): 3.0, (3,): 4.0}


def test_backward_finds_what_forward_cannot() -> None:
    trap = {**ALONE, (0, 1): 9.0, (1, 2): 2.5, (0, 1, 2): 11.0, (0, 1, 2, 3): 20.0}
    found = searched(trap, DropWish(auto=2, fold=False))
    assert found == {"forward": (0, 1), "backward": (1, 2)}


def test_an_exchange_finds_what_both_cannot() -> None:
    hidden = {**ALONE, (0, 3): 8.5, (1, 3): 9.0, (0, 4): 8.0, (1, 4): 7.0}
    found = searched(hidden, DropWish(auto=2, fold=False))
    assert found == {"forward": (0, 4), "backward": (0, 1), "exchange": (1, 4)}


def test_an_exchange_may_make_room_for_one_more() -> None:
    kls = {(0,): 1.0, (0, 3): 3.0, (1, 3): 2.0, (1, 3, 5): 4.0}
    found = searched(kls, DropWish(max_kl=5.0, fold=False))
    assert found == {"forward": (0, 3), "exchange": (1, 3, 5)}


class ToldFolds(Told):
    """The same where tables are folded: costs by layer and receiver."""

    fold = True

    def costs(self, sets: list[Gone], label: str, then: int = 0) -> list[SetCost]:
        return [self.folded(gone) for gone in sets]

    def folded(self, gone: Gone) -> SetCost:
        into = dict(sorted(receivers(self.kept, gone).items()))
        return dataclasses.replace(self.cost(tuple(into.items())), into=into)  # type: ignore[arg-type]


def test_an_exchange_turns_a_table_to_the_other_side() -> None:
    kls: Any = {((2, 3),): 1.0, ((2, 1),): 2.0, ((4, 5),): 1.5}
    kls |= {((2, 3), (4, 5)): 9.0, ((2, 1), (4, 5)): 4.0}
    meter: Any = ToldFolds(kls)
    alone = meter.costs(sets_of_one(meter.kept, fold=True), "")
    steps, found = search_sets(meter, DropWish(auto=2), alone)
    assert found["forward"].into == {2: 3, 4: 5}
    assert found["exchange"].into == {2: 1, 4: 5}
    assert steps[-1].taken is None


def test_a_bound_stops_each_search_where_nothing_fits() -> None:
    kls = {**ALONE, (0, 1): 3.0, (0, 1, 2): 7.0, (0, 1, 2, 3): 8.0, (1, 2): 2.9}
    for search, expected in (("forward", (0, 1)), ("backward", (1, 2))):
        wish = DropWish(max_kl=5.0, fold=False, search=search)  # type: ignore[arg-type]
        assert searched(kls, wish) == {search: expected}
