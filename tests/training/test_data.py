from __future__ import annotations

import numpy as np
import pytest

from powerhouse.training.data import RowOrder, places_of


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_global_batch_of_a_step_is_the_same_for_any_number_of_ranks(num_ranks: int) -> None:
    order = RowOrder(num_rows=21, seed=3)
    for step in range(10):
        batch = np.concatenate([order.rows_at(places_of(step, rank, num_ranks, 8)) for rank in range(num_ranks)])
        np.testing.assert_array_equal(batch, order.rows_at(np.arange(step * 8, step * 8 + 8)))


def test_every_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(num_rows=50, seed=0)
    epochs = order.rows_at(np.arange(150)).reshape(3, 50)

    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    places = np.arange(100)
    first = RowOrder(30, seed=1).rows_at(places)

    np.testing.assert_array_equal(RowOrder(30, seed=1).rows_at(places), first)
    assert not np.array_equal(RowOrder(30, seed=2).rows_at(places), first)


def test_a_place_has_the_same_row_however_it_is_asked_for() -> None:
    order = RowOrder(num_rows=7, seed=0)
    together = order.rows_at(np.array([20, 3, 13, 6, 7]))

    np.testing.assert_array_equal(together, [order.rows_at(np.array([place]))[0] for place in (20, 3, 13, 6, 7)])
