"""Documents' tokens joined to one stream, cut into rows of one length, shuffled by a seed. Pure functions over arrays.

Shapes: T tokens of the stream, N rows, R tokens in a row, D documents. Each document ends with the end-of-text id; the
tail of the stream that fills no row is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


def join(documents: Sequence[Sequence[int]], end_of_text_id: int) -> tuple[Tokens, Indices]:
    """Give the stream of some documents, [T], and the length of each with its end-of-text id, [D]."""
    lengths_D = np.array([len(tokens) + 1 for tokens in documents], dtype=np.int64)
    stream_T = np.full(int(lengths_D.sum()), end_of_text_id, dtype=np.int32)
    start = 0
    for tokens in documents:
        stream_T[start : start + len(tokens)] = tokens
        start += len(tokens) + 1
    return stream_T, lengths_D


def cut(stream_T: Tokens, row_length: int) -> Tokens:
    """Give the stream as rows, [N, R], without a copy."""
    num_rows = len(stream_T) // row_length
    return stream_T[: num_rows * row_length].reshape(num_rows, row_length)


def shuffle_order(num_rows: int, seed: int) -> Indices:
    """Give the stream's row that becomes row 0, 1, ... of the shuffled corpus, [N]."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)


def documents_of_rows(lengths_D: Indices, num_rows: int, row_length: int) -> tuple[Indices, Indices]:
    """Give the first and the last document in each row of the stream, [N] each, as numbers of documents."""
    ends_D = np.cumsum(lengths_D)
    first_token_N = np.arange(num_rows, dtype=np.int64) * row_length
    first_N = np.searchsorted(ends_D, first_token_N, side="right")
    last_N = np.searchsorted(ends_D, first_token_N + row_length - 1, side="right")
    return first_N, last_N
