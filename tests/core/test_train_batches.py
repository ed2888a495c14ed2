"""Data order: a permutation a epoch, a function of seed and step alone."""

import numpy as np
import pytest

from tolkit.errors import DataError
from tolkit.train.batches import WindowOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_place_has_one_image(size: int) -> None:
    images = permute(np.arange(size, dtype=np.uint64), size, (3, 1))
    assert sorted(images.tolist()) == list(range(size))


def test_the_order_is_frozen() -> None:
    # A changed order would make unfinished runs continue on other data.
    images = permute(np.arange(10, dtype=np.uint64), 10, (0, 0))
    assert images.tolist() == [5, 3, 1, 4, 6, 9, 0, 2, 7, 8]


def test_keys_give_orders_without_relation() -> None:
    places = np.arange(1000, dtype=np.uint64)
    orders = [permute(places, 1000, key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(first, places)[0, 1]) < 0.15
        for second in orders[:i]:
            assert (first == second).mean() < 0.02
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_an_epoch_shows_every_window_once_then_reorders() -> None:
    order = WindowOrder(np.arange(101, dtype=np.uint32), 10, seed=5)
    assert order.windows == 10
    firsts = [order.batch(step, 4)[:, 0].tolist() for step in range(5)]
    seen = [start for batch in firsts for start in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(0, 100, 10))
    assert seen[:10] != seen[10:]


def test_windows_are_inputs_and_their_successors() -> None:
    batch = WindowOrder(np.arange(50, 92, dtype=np.uint32), 10, seed=0).batch(0, 4)
    assert batch.dtype == np.int64 and batch.shape == (4, 11)
    assert sorted(batch[:, 0].tolist()) == [50, 60, 70, 80]
    assert (np.diff(batch) == 1).all()


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    ids = np.arange(300, dtype=np.uint32)
    used = WindowOrder(ids, 7, seed=1)
    for step in range(30):
        used.batch(step, 8)
    assert (used.batch(30, 8) == WindowOrder(ids, 7, seed=1).batch(30, 8)).all()
    assert (used.batch(30, 8) != WindowOrder(ids, 7, seed=2).batch(30, 8)).any()


def test_a_batch_larger_than_the_text_wraps() -> None:
    order = WindowOrder(np.arange(11, dtype=np.uint32), 5, seed=0)
    assert sorted(order.batch(0, 4)[:, 0].tolist()) == [0, 0, 5, 5]


@pytest.mark.parametrize(("tokens", "fits"), [(11, True), (10, False), (0, False)])
def test_text_shorter_than_a_window(tokens: int, fits: bool) -> None:
    ids = np.zeros(tokens, np.uint32)
    if fits:
        assert WindowOrder(ids, 10, 0).windows == 1
    else:
        with pytest.raises(DataError, match=f"{tokens} tokens, shorter than one window"):
            WindowOrder(ids, 10, 0)
