from __future__ import annotations

import numpy as np

from powerhouse.corpora.pack import cut, documents_of_rows, join, shuffle_order

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13]]


def test_documents_are_joined_each_with_its_end_and_the_tail_is_left_out() -> None:
    stream, lengths = join(DOCUMENTS, 0)
    assert stream.tolist() == [5, 6, 7, 0, 8, 0, 0, 9, 10, 11, 12, 13, 0]
    assert lengths.tolist() == [4, 2, 1, 6]
    assert cut(stream, 4).tolist() == [[5, 6, 7, 0], [8, 0, 0, 9], [10, 11, 12, 13]]


def test_each_row_knows_its_documents() -> None:
    _, lengths = join(DOCUMENTS, 0)
    first, last = documents_of_rows(lengths, 3, 4)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(0, 0), (1, 3), (3, 3)]


def test_the_shuffle_is_a_permutation_that_the_seed_decides() -> None:
    order = shuffle_order(1000, 7)
    assert sorted(order.tolist()) == list(range(1000))
    np.testing.assert_array_equal(order, shuffle_order(1000, 7))
    assert order.tolist() != shuffle_order(1000, 8).tolist()
    assert order.tolist() != list(range(1000))
