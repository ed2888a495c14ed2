"""Where a dropped layer's table goes."""

from __future__ import annotations

import pytest

from tolkit.compress.fold import drop, members_of
from tolkit.errors import UsageError
from tolkit_formats.manifest import LayerStatus

KEPT = LayerStatus("kept")
DROPPED = LayerStatus("dropped")


def folded(into: int) -> LayerStatus:
    return LayerStatus("folded", into)


ALL = (KEPT,) * 5


def test_first_middle_and_run_go_to_the_next_kept() -> None:
    assert drop(ALL, [0], fold=True, option="-")[0] == folded(1)
    assert drop(ALL, [2, 3], fold=True, option="-") == (KEPT, KEPT, folded(4), folded(4), KEPT)


def test_a_tail_goes_to_the_last_kept() -> None:
    assert drop(ALL, [3, 4], fold=True, option="-") == (KEPT, KEPT, KEPT, folded(2), folded(2))


def test_plain() -> None:
    assert drop(ALL, [1, 4], fold=False, option="-") == (KEPT, DROPPED, KEPT, KEPT, DROPPED)


def test_what_was_folded_into_a_dropped_layer_goes_along() -> None:
    once = drop(ALL, [1], fold=True, option="-")
    assert drop(once, [2], fold=True, option="-") == (KEPT, folded(3), folded(3), KEPT, KEPT)
    assert drop(once, [2], fold=False, option="-") == (KEPT, DROPPED, DROPPED, KEPT, KEPT)


def test_members_are_the_planes_that_still_exist() -> None:
    once = drop(ALL, [1], fold=True, option="-")
    assert members_of(ALL, once) == {0: (0,), 2: (1, 2), 3: (3,), 4: (4,)}
    twice = drop(once, [2, 4], fold=True, option="-")
    # Layer 1 has no plane of its own any more: it is inside 2.
    assert members_of(once, twice) == {0: (0,), 3: (2, 3, 4)}
    assert members_of(ALL, drop(ALL, [1], fold=False, option="-"))[2] == (2,)


@pytest.mark.parametrize(
    ("statuses", "layers", "words"),
    [
        (ALL, [5], "layer 5 is out of range, the model has layers 0 to 4"),
        (ALL, [-1], "out of range"),
        (ALL, [0, 1, 2, 3, 4], "would drop all 5 layers"),
        ((KEPT, DROPPED), [1], "layer 1 has no table any more"),
        ((KEPT, DROPPED), [0], "would drop all 1 layers"),
    ],
)
def test_refused(statuses: tuple[LayerStatus, ...], layers: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        drop(statuses, layers, fold=True, option="--layers")
