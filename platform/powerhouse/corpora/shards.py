"""Packed token rows on disk: Arrow IPC files, memory-mapped when read.

Shapes: N rows, R tokens in a row. A row of R tokens trains R - 1 predictions: inputs row[:-1], labels row[1:].
Columns: `tokens`, a list of the fixed size R; and, where the writer knew them, `starts`, the places in the row where the
tokens of another document, or of another part of one, begin. The first is 0. And, in what is made for tuning, `learned`, a list
of R that is 1 at each token that is to be predicted; without the column every token is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from powerhouse.errors import InputError

Rows = npt.NDArray[np.int32]
Marks = npt.NDArray[np.bool_]


def write_shard(
    path: Path,
    rows_NR: Rows,
    starts: Sequence[npt.NDArray[np.int64]] | None = None,
    learned_NR: npt.NDArray[np.uint8] | None = None,
) -> None:
    """Write the rows as one file; shards are read in the order of their names."""
    columns = {"tokens": pa.FixedSizeListArray.from_arrays(pa.array(rows_NR.reshape(-1)), rows_NR.shape[1])}
    if starts is not None:
        columns["starts"] = pa.array(starts, type=pa.list_(pa.int32()))
    if learned_NR is not None:
        columns["learned"] = pa.FixedSizeListArray.from_arrays(pa.array(learned_NR.reshape(-1)), learned_NR.shape[1])
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


class TokenRows:
    """All rows of a folder of shards, by number; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        paths = sorted(directory.glob("*.arrow"))
        if not paths:
            raise InputError(f"{directory}: no token shards (*.arrow)", do="run jobs/train_tokenizer.py first")
        self._tables = [_map_shard(path) for path in paths]
        self._shards = [_rows_of(table) for table in self._tables]
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

    @property
    def tells_learned(self) -> bool:
        """Whether only some of the tokens are to be predicted."""
        return "learned" in self._tables[0].column_names

    def take_learned(self, indices: npt.NDArray[np.int64]) -> Marks:
        """Tell of each token of these rows whether it is to be predicted, [len(indices), R]."""
        out = np.ones((len(indices), self.row_length), dtype=np.bool_)
        for place, index in enumerate(indices):
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            if "learned" in self._tables[number].column_names:
                out[place] = self._tables[number]["learned"][int(index - self._starts[number])].values.to_numpy()
        return out

    def take_documents(self, indices: npt.NDArray[np.int64]) -> Rows:
        """Number the documents of these rows: 0 for each token of a row's first, 1 for the second, ..., [len(indices), R].

        Raises:
            InputError: the shards do not tell where documents start.
        """
        out = np.zeros((len(indices), self.row_length), dtype=np.int32)
        for place, index in enumerate(indices):
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            if "starts" not in self._tables[number].column_names:
                raise InputError(
                    f"{self._directory}: the shards have no column `starts`", do="run jobs/train_tokenizer.py again"
                )
            starts = self._tables[number]["starts"][int(index - self._starts[number])].as_py()
            out[place, starts[1:]] = 1
        return np.cumsum(out, axis=1, dtype=np.int32)


def _map_shard(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
            table.column("tokens")
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{path}: damaged token shard", got=error, do="run jobs/train_tokenizer.py again") from None
    return table


def _rows_of(table: pa.Table) -> Rows:
    column = table.column("tokens").combine_chunks()
    rows: Rows = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return rows
