"""What becomes of each document, decided over all of them: columns in, columns out, no text and no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
    bad = index.filter(pc.equal(index["reason"], BAD_FILE))
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
    columns = zip(_file_keys(index), index["reason"].to_pylist(), index["detail"].to_pylist(), strict=True)
    final = [(BAD_FILE, details[key]) if key in details else (reason, detail) for key, reason, detail in columns]
    return _replace(index, reason=[reason for reason, _ in final], detail=[detail for _, detail in final])


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
    reasons = index["reason"].to_pylist()
    is_heldout = index["doc_id"].to_numpy().astype(np.float64) < heldout_share * 2.0**64
    splits = np.where([reason is not None for reason in reasons], "rejects", np.where(is_heldout, "heldout", "train"))
    num_copies = np.where(splits == "train", _num_copies(index, weights), 1)
    is_unwanted = num_copies == 0
    splits[is_unwanted], num_copies[is_unwanted] = "rejects", 1
    index = _remove(index, [Removal(int(row), "mixing_weight") for row in np.flatnonzero(is_unwanted)])
    _check_not_empty(splits, index["reason"].to_pylist(), heldout_share)
    index = _replace(index, split=splits.tolist()).append_column("num_copies", pa.array(num_copies))
    return Verdicts(index, twins, sections, repeated_lines)


def _num_copies(index: pa.Table, weights: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """Give how often each document is wanted: of a weight of 2.3, three times for the 30% with the lowest mixed hash."""
    sources = index["source"].combine_chunks().dictionary_encode()
    wanted = np.array([weights[source] for source in sources.dictionary.to_pylist()])[sources.indices.to_numpy()]
    mixed = index["doc_id"].to_numpy() * np.uint64(0x9E3779B97F4A7C15)  # the doc_id itself decides what is held out
    return np.asarray(np.floor(wanted + 1 - (mixed.astype(np.float64) / 2.0**64) - 1e-12), dtype=np.int64)


def _remove(index: pa.Table, removals: Sequence[Removal]) -> pa.Table:
    if not removals:
        return index
    reasons, details = index["reason"].to_pylist(), index["detail"].to_pylist()
    for removal in removals:
        reasons[removal.row], details[removal.row] = removal.reason, removal.detail
    return _replace(index, reason=reasons, detail=details)


def _check_not_empty(splits: npt.NDArray[np.str_], reasons: list[str | None], heldout_share: float) -> None:
    counts = Counter(reason for reason in reasons if reason is not None)
    told = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    num_kept = len(reasons) - sum(counts.values())
    if not num_kept:
        raise InputError(
            "the corpus is empty after filtering",
            got=f"{len(reasons)} documents, left out for: {told}",
            do="give other text, or loosen the limits under `quality`",
        )
    for split, is_asked in (("train", True), ("heldout", heldout_share > 0)):
        if is_asked and split not in splits:
            raise InputError(
                f"the corpus has no document for {split}",
                got=f"{num_kept} documents, heldout_share={heldout_share:g}",
                do="give more text, a smaller chunk_chars, or another heldout_share",
            )


def _file_keys(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["source"].to_pylist(), table["path"].to_pylist(), strict=True))


def _replace(table: pa.Table, **columns: list[str | None] | list[str]) -> pa.Table:
    kept = table.drop_columns([name for name in columns if name in table.column_names])
    for name, values in columns.items():
        kept = kept.append_column(name, pa.array(values, type=pa.string()))
    return kept
