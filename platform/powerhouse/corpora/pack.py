"""Documents packed into rows of one length by best fit, so that few are cut; pure functions over arrays of lengths.

Source: Ding et al. 2024 (arXiv 2404.10830), section 3: best-fit-decreasing. `pack` pads no row: a few rows are
taken apart to fill the last places of the others, so every token of a row is one of a document. `pack_whole` cuts nothing.

Shapes: T tokens of the stream of all documents, D documents in it, P pieces of them, N rows, R tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.integer[Any])


@dataclass(frozen=True)
class Pieces:
    """Stretches of the stream, one after the other as they fill the rows: row by row, in the order within the row."""

    starts_P: Indices
    lengths_P: Indices
    row_length: int

    @property
    def num_rows(self) -> int:
        return int(self.lengths_P.sum()) // self.row_length

    @cached_property
    def boundaries_N1(self) -> Indices:
        """The piece with which each row begins, and P at the end, [N + 1]."""
        return np.searchsorted(np.cumsum(self.lengths_P), np.arange(self.num_rows + 1) * self.row_length, side="right")


def join(documents: Sequence[Sequence[int]], end_of_text_id: int) -> tuple[Tokens, Indices]:
    """Give the stream of some documents, [T], and the length of each with its end-of-text id, [D]."""
    lengths_D = np.array([len(tokens) + 1 for tokens in documents], dtype=np.int64)
    stream_T = np.full(int(lengths_D.sum()), end_of_text_id, dtype=np.int32)
    start = 0
    for tokens in documents:
        stream_T[start : start + len(tokens)] = tokens
        start += len(tokens) + 1
    return stream_T, lengths_D


def pack(lengths_D: Indices, row_length: int) -> Pieces:
    """Lay documents of these lengths into full rows; less than one row of tokens is left out.

    A document longer than a row gives full rows and a rest; the rests, longest first, go where they leave the least room.
    """
    starts_D = np.cumsum(lengths_D) - lengths_D
    num_full_D = lengths_D // row_length
    full_starts = np.repeat(starts_D, num_full_D) + _count_up(num_full_D) * row_length
    rests_D = lengths_D % row_length
    has_rest = rests_D > 0
    rest_starts, rests = (starts_D + num_full_D * row_length)[has_rest], rests_D[has_rest]
    order = np.argsort(-rests, kind="stable")
    rest_starts, rests = _fill(rest_starts[order], rests[order], best_fit(rests[order], row_length), row_length)
    full = np.full(len(full_starts), row_length, dtype=np.int64)
    return Pieces(np.concatenate([full_starts, rest_starts]), np.concatenate([full, rests]), row_length)


def pack_whole(lengths_D: Indices, row_length: int) -> Pieces:
    """Lay documents of up to a row into rows, none of them cut.

    What a row has left is one more piece, of what the caller puts at the stream's end, from T on: R tokens of padding.
    """
    order = np.argsort(-lengths_D, kind="stable")
    starts, lengths = (np.cumsum(lengths_D) - lengths_D)[order], lengths_D[order]
    rows = best_fit(lengths, row_length)
    rooms = row_length - np.bincount(rows, weights=lengths).astype(np.int64)
    is_open = rooms > 0
    by_row = np.argsort(np.concatenate([rows, np.flatnonzero(is_open)]), kind="stable")
    padding = np.full(int(is_open.sum()), lengths_D.sum())
    return Pieces(np.concatenate([starts, padding])[by_row], np.concatenate([lengths, rooms[is_open]])[by_row], row_length)


def best_fit(lengths: Indices, row_length: int) -> Indices:
    """Give the row of each piece: the one with the least room that is enough, else a new one. The pieces come longest first."""
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where some row has room for r tokens
    num_rows = 0
    out = np.empty(len(lengths), dtype=np.int64)
    for piece, length in enumerate(lengths.tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = row_length, num_rows, num_rows + 1
        out[piece] = row
        if left := room - length:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return out


def _fill(starts: Indices, lengths: Indices, rows: Indices, row_length: int) -> tuple[Indices, Indices]:
    """Take the emptiest rows apart and pour their pieces into what room the others have; give the pieces in their order."""
    used = np.bincount(rows, weights=lengths).astype(np.int64)
    fullest_first = np.argsort(-used, kind="stable")
    num_kept = int(lengths.sum()) // row_length
    place_of_row = np.empty(len(used), dtype=np.int64)
    place_of_row[fullest_first] = np.arange(len(used))
    places = place_of_row[rows]
    order = np.argsort(places, kind="stable")
    starts, lengths, places = starts[order], lengths[order], places[order]
    is_kept = places < num_kept
    rooms = row_length - used[fullest_first[:num_kept]]
    poured_starts, poured_lengths, poured_places = _pour(starts[~is_kept], lengths[~is_kept], rooms)
    joined = np.argsort(np.concatenate([places[is_kept], poured_places]), kind="stable")
    return (
        np.concatenate([starts[is_kept], poured_starts])[joined],
        np.concatenate([lengths[is_kept], poured_lengths])[joined],
    )


def _pour(starts: Indices, lengths: Indices, rooms: Indices) -> tuple[Indices, Indices, Indices]:
    """Cut the pieces, laid end to end, at the ends of the rooms; give starts, lengths and the room of each part."""
    piece_ends, room_ends = np.cumsum(lengths), np.cumsum(rooms)
    total = int(room_ends[-1]) if len(rooms) else 0
    cuts = np.unique(np.concatenate([[0], piece_ends[piece_ends < total], room_ends]))
    first, last = cuts[:-1], cuts[1:]
    piece = np.searchsorted(piece_ends, first, side="right")
    return starts[piece] + first - (piece_ends - lengths)[piece], last - first, np.searchsorted(room_ends, first, side="right")


def _count_up(counts: Indices) -> Indices:
    """Give 0, 1, ... up to each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(ends - counts, counts)


def gather(stream_T: npt.NDArray[Number], pieces: Pieces, rows: Indices) -> tuple[npt.NDArray[Number], list[Indices]]:
    """Give what stands in the stream for some rows, [len(rows), R], and where in each row its pieces start."""
    tokens = np.empty((len(rows), pieces.row_length), dtype=stream_T.dtype)
    places = []
    for row, first, last in zip(tokens, pieces.boundaries_N1[rows], pieces.boundaries_N1[rows + 1], strict=True):
        lengths = pieces.lengths_P[first:last]
        places.append(np.cumsum(lengths) - lengths)
        for place, start, length in zip(places[-1], pieces.starts_P[first:last], lengths, strict=True):
            row[place : place + length] = stream_T[start : start + length]
    return tokens, places


def shuffle_order(num_rows: int, seed: int) -> Indices:
    """Give the packed row that becomes row 0, 1, ... of the shuffled corpus, [N]."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)


def documents_of_pieces(lengths_D: Indices, pieces: Pieces) -> Indices:
    """Give the number of the document that each piece is of, [P]."""
    return np.searchsorted(np.cumsum(lengths_D), pieces.starts_P, side="right")
