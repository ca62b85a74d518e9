"""The files of a stage that a kill does not take back to its beginning: each is a part of what one task writes.

A part's name tells where it belongs, `00000002_00000000-00003-end.parquet`: the order of its first document, its number within
the task, and whether it is the task's last. It appears whole or not at all. So the names alone tell which tasks are finished,
and which parts of the corpus' order a file holds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from powerhouse.artifacts import replacing


@dataclass(frozen=True, order=True)
class Part:
    """One file of documents."""

    first: int
    """Order of its first document, or where that would stand."""
    number: int
    """Place within its task, from 0."""
    is_last: bool
    """No other part of the task follows."""

    @property
    def name(self) -> str:
        return f"{self.first >> 32:08x}_{self.first & 0xFFFFFFFF:08x}-{self.number:05d}{'-end' * self.is_last}.parquet"

    @classmethod
    def of(cls, path: Path) -> Part:
        """Give the part that a file is, by its name."""
        first, number, *end = path.stem.split("-")
        return cls(int(first, 16), int(number), bool(end))  # int() passes over the underscore

    def write(self, folder: Path, documents: pa.Table) -> None:
        with replacing(folder / self.name) as path:
            pq.write_table(documents, path, compression="zstd")


def list_parts(folder: Path) -> list[Part]:
    """Give the parts of a folder in the corpus' order; what a killed worker left half written is removed."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
    return sorted(Part.of(path) for path in folder.glob("*.parquet"))


def parts_between(parts: Sequence[Part], start: int, stop: int) -> Sequence[Part]:
    """Give the parts, of ascending ones, whose first document stands at `start` or after it, and before `stop`."""
    return parts[bisect_left(parts, start, key=_first) : bisect_left(parts, stop, key=_first)]


def parts_holding(parts: Sequence[Part], first: int, last: int) -> Sequence[Part]:
    """Give the parts, of ascending ones, that hold the documents from `first` to `last`."""
    return parts[max(0, bisect_right(parts, first, key=_first) - 1) : bisect_right(parts, last, key=_first)]


def is_whole(parts: Sequence[Part]) -> bool:
    """Tell whether these are all parts of a task."""
    return bool(parts) and parts[-1].is_last and [part.number for part in parts] == list(range(len(parts)))


def count_documents(folder: Path, parts: Sequence[Part]) -> int:
    return sum(pq.read_metadata(folder / part.name).num_rows for part in parts)


def _first(part: Part) -> int:
    return part.first
