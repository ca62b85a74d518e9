"""Writes packed rows as shards, and of which documents each row is.

Shapes: T tokens of the stream, P pieces, N rows, R tokens in a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from powerhouse.corpora.pack import Indices, Pieces, Tokens, gather
from powerhouse.corpora.shards import write_shard


def write_rows(
    folder: Path,
    stream_T: Tokens,
    pieces: Pieces,
    order_N: Indices,
    rows_per_shard: int,
    learned_T: npt.NDArray[np.uint8] | None = None,
) -> None:
    """Write the rows in this order, never more than one shard in memory."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(order_N), rows_per_shard)):
        rows = order_N[start : start + rows_per_shard]
        tokens_NR, starts = gather(stream_T, pieces, rows)
        learned_NR = None if learned_T is None else gather(learned_T, pieces, rows)[0]
        write_shard(folder / f"rows-{number:05d}.arrow", tokens_NR, starts, learned_NR)


def write_provenance(path: Path, doc_ids_P: npt.NDArray[Any], pieces: Pieces, order_N: Indices) -> None:
    """Write, for each row of the shards, the id of the document that each of its pieces is of, None where it is of none."""
    bounds = pieces.boundaries_N1
    ids = [doc_ids_P[bounds[row] : bounds[row + 1]] for row in order_N]
    pq.write_table(pa.table({"doc_ids": pa.array(ids, type=pa.list_(pa.uint64()))}), path)
