"""Files of items: JSON lines, CSV, TSV or Parquet; a row is a mapping of its columns."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from powerhouse.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path, columns: Sequence[str], limit: int | None = None) -> list[Row]:
    """Give the first `limit` rows, or all.

    Raises:
        InputError: the file is missing, damaged, of another kind or empty, or a row lacks one of the columns.
    """
    if path.suffix not in _READERS:
        raise InputError(f"{path}: unknown kind of data file", got=path.suffix, allowed=", ".join(_READERS))
    if not path.is_file():
        raise InputError(f"{path}: no such data file", do="write it first, or correct the path")
    try:
        rows = _READERS[path.suffix](path)[:limit]
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path}: damaged data file", got=error) from None
    if not rows:
        raise InputError(f"{path}: no rows", do="give data with at least one item")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in columns if name not in row]:
            there = ", ".join(map(str, row))
            raise InputError(f"{path}: row {number} lacks a column", got=f"no {missing[0]}", allowed=f"a row has {there}")
    return rows


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json_lines(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _read_csv(path: Path, delimiter: str = ",") -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("a row has another number of cells than the header")
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": lambda path: list(pq.read_table(path).to_pylist()),
}
