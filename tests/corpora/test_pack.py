from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerhouse.corpora.pack import Pieces, best_fit, documents_of_pieces, gather, join, pack, pack_whole, shuffle_order

LENGTHS = st.lists(st.integers(1, 70), max_size=60)


def spans(pieces: Pieces) -> list[tuple[int, int]]:
    """The stretches of the stream, by their place in it."""
    return sorted(zip(pieces.starts_P.tolist(), (pieces.starts_P + pieces.lengths_P).tolist(), strict=True))


def plain_best_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """The definition: look at every row."""
    rows: list[list[int]] = []
    for length in lengths:
        fitting = [row for row in rows if sum(row) + length <= row_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def test_documents_are_joined_each_with_its_end() -> None:
    stream, lengths = join([[5, 6, 7], [8], [], [9, 10, 11, 12, 13]], 0)
    assert stream.tolist() == [5, 6, 7, 0, 8, 0, 0, 9, 10, 11, 12, 13, 0]
    assert lengths.tolist() == [4, 2, 1, 6]


@given(LENGTHS, st.integers(2, 33))
def test_every_token_stands_in_one_place_but_for_less_than_a_row_and_all_rows_are_full(lengths: list[int], size: int) -> None:
    pieces = pack(np.array(lengths, dtype=np.int64), size)
    assert pieces.num_rows == sum(lengths) // size
    assert pieces.lengths_P.sum() == pieces.num_rows * size
    ordered = spans(pieces)
    assert all(one[1] <= other[0] for one, other in pairwise(ordered))
    assert all(0 <= start < stop <= sum(lengths) for start, stop in ordered)
    documents = documents_of_pieces(np.array(lengths, dtype=np.int64), pieces)
    ends = np.cumsum(lengths)
    assert all(stop <= ends[document] for document, stop in zip(documents, pieces.starts_P + pieces.lengths_P, strict=True))


@given(LENGTHS, st.integers(2, 33))
def test_gathered_rows_are_the_pieces_of_the_stream(lengths: list[int], size: int) -> None:
    pieces = pack(np.array(lengths, dtype=np.int64), size)
    stream = np.arange(sum(lengths), dtype=np.int32)
    order = shuffle_order(pieces.num_rows, 0)
    rows, places = gather(stream, pieces, order)
    for number, row, starts in zip(order, rows, places, strict=True):
        bounds = pieces.boundaries_N1[number], pieces.boundaries_N1[number + 1]
        assert starts[0] == 0
        for part, piece in zip(np.split(row, starts[1:]), range(*bounds), strict=True):
            assert part.tolist() == list(range(pieces.starts_P[piece], pieces.starts_P[piece] + pieces.lengths_P[piece]))


@given(st.lists(st.integers(1, 20), max_size=50))
def test_best_fit_fills_rows_as_a_search_through_all_of_them_does(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    rows = best_fit(np.array(lengths, dtype=np.int64), 20)
    used = sorted(np.bincount(rows, weights=lengths).astype(int).tolist()) if lengths else []
    assert used == sorted(map(sum, plain_best_fit(lengths, 20)))


def test_documents_that_fit_together_share_rows_uncut() -> None:
    pieces = pack(np.array([7, 3, 6, 4, 10, 25]), 10)
    assert (pieces.num_rows, spans(pieces)) == (5, [(0, 7), (7, 10), (10, 16), (16, 20), (20, 30), (30, 40), (40, 50)])


@pytest.mark.parametrize("row_length", [257, 1025])
def test_best_fit_cuts_a_tenth_of_the_documents_that_a_plain_cut_of_the_stream_does(row_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int64) + 1
    pieces = pack(lengths, row_length)
    num_pieces = np.bincount(documents_of_pieces(lengths, pieces), minlength=len(lengths))
    ends = np.cumsum(lengths)
    num_rows_touched = (ends - 1) // row_length - (ends - lengths) // row_length + 1
    needed = -(-lengths // row_length)
    assert (num_pieces > needed).sum() < 0.1 * (num_rows_touched > needed).sum()


def test_the_shuffle_is_a_permutation_that_the_seed_decides() -> None:
    order = shuffle_order(1000, 7)
    assert sorted(order.tolist()) == list(range(1000))
    np.testing.assert_array_equal(order, shuffle_order(1000, 7))
    assert order.tolist() != shuffle_order(1000, 8).tolist()
    assert order.tolist() != list(range(1000))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 33))
def test_documents_packed_whole_are_not_cut_and_only_padding_is_added(lengths: list[int], size: int) -> None:
    pieces = pack_whole(np.array(lengths, dtype=np.int64), size)
    is_padding = pieces.starts_P == sum(lengths)
    documents = documents_of_pieces(np.array(lengths, dtype=np.int64), pieces)
    assert sorted(documents[~is_padding].tolist()) == list(range(len(lengths)))
    assert (pieces.lengths_P[~is_padding] == np.array(lengths)[documents[~is_padding]]).all()
    stream = np.concatenate([np.arange(sum(lengths)), np.full(size, -1)])
    rows, starts = gather(stream, pieces, np.arange(pieces.num_rows))
    assert sorted(rows[rows >= 0].tolist()) == list(range(sum(lengths)))
    assert pieces.num_rows == len(plain_best_fit(sorted(lengths, reverse=True), size))
    for row, places in zip(rows, starts, strict=True):
        assert [place for place in places if row[place] == -1] == [size - (row == -1).sum()] * bool((row == -1).any())
