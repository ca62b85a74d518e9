"""Packed token rows on disk: Arrow IPC files with one fixed-size list column, memory-mapped when read.

Shapes: N rows, R tokens in a row. A row of R tokens trains R - 1 predictions: inputs row[:-1], labels row[1:].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from powerhouse.errors import InputError

Rows = npt.NDArray[np.int32]


def write_shard(path: Path, rows_NR: Rows) -> None:
    """Write the rows as one file; shards are read in the order of their names."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows_NR.reshape(-1)), rows_NR.shape[1])
    table = pa.table({"tokens": column})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


class TokenRows:
    """All rows of a folder of shards, by number; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(directory.glob("*.arrow"))
        if not paths:
            raise InputError(f"{directory}: no token shards (*.arrow)", do="run jobs/train_tokenizer.py first")
        self._shards = [_map_shard(path) for path in paths]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def row_length(self) -> int:
        return int(self._shards[0].shape[1])

    def take(self, indices: npt.NDArray[np.int64]) -> Rows:
        """Copy the rows of these numbers, [len(indices), R], in the order asked for."""
        out = np.empty((len(indices), self.row_length), dtype=np.int32)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            is_here = shard_of == number
            out[is_here] = self._shards[number][indices[is_here] - self._starts[number]]
        return out


def _map_shard(path: Path) -> Rows:
    try:
        with pa.memory_map(str(path)) as source:
            column = pa.ipc.open_file(source).read_all().column("tokens").combine_chunks()
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{path}: damaged token shard", got=error, do="run jobs/train_tokenizer.py again") from None
    rows: Rows = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return rows
