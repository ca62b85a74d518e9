"""What becomes of each document, decided over all of them: columns in, columns out, no text and no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from powerhouse.corpora.document import CorpusStep, Removal
from powerhouse.corpora.process import BAD_FILE
from powerhouse.errors import InputError

_NUM_NAMED = 5
SPLITS = ("train", "heldout", "rejects")
_TRAIN, _HELDOUT, _REJECTS = range(3)


@dataclass(frozen=True)
class Verdicts:
    """The index of all documents in their order, with `reason`, `detail`, `split` and `num_copies` final."""

    index: pa.Table
    twins: list[Removal]
    """The documents that were left out for being like a kept one."""
    sections: dict[str, dict[str, Any]]
    """What the corpus steps told for the report."""
    repeated_lines: npt.NDArray[np.uint64]
    """Hashes of the lines that no text keeps."""


def reject_bad_files(index: pa.Table, num_files: int, max_share: float) -> pa.Table:
    """Leave out every document of a damaged file.

    Raises:
        InputError: more than `max_share` of the files are damaged.
    """
    bad = index.select(["source", "path", "detail"]).filter(pc.equal(index["reason"], BAD_FILE))
    details = dict(zip(_file_keys(bad), bad["detail"].to_pylist(), strict=True))  # a large file is read in several pieces
    if len(details) > max_share * num_files:
        messages = list(details.values())
        more = f"\n  and {len(messages) - _NUM_NAMED} more" if len(messages) > _NUM_NAMED else ""
        raise InputError(
            f"{len(details)} of {num_files} input files cannot be read:\n  " + "\n  ".join(messages[:_NUM_NAMED]) + more,
            allowed=f"max_bad_file_share={max_share:g} of the files",
            do="mend them, or raise max_bad_file_share: bad files are then left out, named and counted",
        )
    if not details:
        return index
    bad_rows = [(row, details[key]) for row, key in enumerate(_file_keys(index)) if key in details]
    return _remove(index, [Removal(row, BAD_FILE, detail) for row, detail in bad_rows])


def decide(index: pa.Table, steps: Sequence[CorpusStep], heldout_share: float, weights: Mapping[str, float]) -> Verdicts:
    """Run the corpus steps one after the other, and split what they leave by the hash of its place.

    Raises:
        InputError: nothing is left to train on, or nothing is held out.
    """
    twins: list[Removal] = []
    repeated_lines = np.empty(0, dtype=np.uint64)
    sections = {}
    for step in steps:
        outcome = step(index)
        index = _remove(index, outcome.removals)
        for column, values in outcome.columns.items():
            index = index.set_column(index.column_names.index(column), column, values)
        if outcome.repeated_lines is not None:
            repeated_lines = outcome.repeated_lines
        twins += [removal for removal in outcome.removals if removal.twin is not None]
        if outcome.report:
            sections[step.name] = outcome.report
    is_heldout = index["doc_id"].to_numpy().astype(np.float64) < heldout_share * 2.0**64
    num_copies = np.where(is_heldout, 1, _num_copies(index, weights))
    is_left = pc.is_null(index["reason"]).to_numpy()
    index = _remove(index, [Removal(int(row), "mixing_weight") for row in np.flatnonzero(is_left & (num_copies == 0))])
    is_left &= num_copies > 0
    num_copies[~is_left] = 1
    splits = np.where(~is_left, _REJECTS, np.where(is_heldout, _HELDOUT, _TRAIN)).astype(np.int8)
    _check_not_empty(splits, index["reason"], heldout_share)
    names = pa.DictionaryArray.from_arrays(pa.array(splits), pa.array(SPLITS)).cast(pa.string())
    index = index.append_column("split", names).append_column("num_copies", pa.array(num_copies))
    return Verdicts(index, twins, sections, repeated_lines)


def _num_copies(index: pa.Table, weights: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """Give how often each document is wanted: of a weight of 2.3, three times for the 30% with the lowest mixed hash."""
    sources = index["source"].combine_chunks().dictionary_encode()
    wanted = np.array([weights[source] for source in sources.dictionary.to_pylist()])[sources.indices.to_numpy()]
    mixed = index["doc_id"].to_numpy() * np.uint64(0x9E3779B97F4A7C15)  # the doc_id itself decides what is held out
    return np.asarray(np.floor(wanted + 1 - (mixed.astype(np.float64) / 2.0**64) - 1e-12), dtype=np.int64)


def _remove(index: pa.Table, removals: Sequence[Removal]) -> pa.Table:
    """Write the reasons and details of the removals into the index, of two for one row the last."""
    if not removals:
        return index
    rows = np.fromiter((removal.row for removal in removals), np.int64, len(removals))
    order = np.argsort(rows, kind="stable")
    ordered = [removals[number] for number in order[np.diff(rows[order], append=-1) != 0].tolist()]
    is_removed = np.zeros(index.num_rows, dtype=bool)
    is_removed[rows] = True
    mask = pa.array(is_removed)
    return _replace(
        index,
        reason=pc.replace_with_mask(_whole(index["reason"]), mask, pa.array([item.reason for item in ordered])),
        detail=pc.replace_with_mask(_whole(index["detail"]), mask, pa.array([item.detail for item in ordered])),
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.cast(pa.string()).chunks) if column.num_chunks else pa.array([], type=pa.string())


def _check_not_empty(splits: npt.NDArray[np.int8], reasons: pa.ChunkedArray, heldout_share: float) -> None:
    counts = pc.value_counts(reasons.drop_null()).to_pylist()
    told = ", ".join(f"{item['values']} {item['counts']}" for item in sorted(counts, key=lambda item: -item["counts"]))
    num_kept = reasons.null_count
    if not num_kept:
        raise InputError(
            "the corpus is empty after filtering",
            got=f"{len(reasons)} documents, left out for: {told}",
            do="give other text, or loosen the limits under `quality`",
        )
    for number, is_asked in ((_TRAIN, True), (_HELDOUT, heldout_share > 0)):
        if is_asked and not (splits == number).any():
            raise InputError(
                f"the corpus has no document for {SPLITS[number]}",
                got=f"{num_kept} documents, heldout_share={heldout_share:g}",
                do="give more text, a smaller chunk_chars, or another heldout_share",
            )


def _file_keys(table: pa.Table) -> Iterator[tuple[str, str]]:
    for batch in table.select(["source", "path"]).to_batches():
        yield from zip(batch["source"].to_pylist(), batch["path"].to_pylist(), strict=True)


def _replace(table: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table
