"""What becomes of each document, decided over all of them: values in, values out, no text and no Ray."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from powerhouse.corpora import dedup
from powerhouse.corpora.process import BAD_FILE
from powerhouse.errors import InputError

INDEX_COLUMNS = [
    "order", "doc_id", "source", "path", "reason", "detail", "num_chars", "num_emails", "num_phones", "num_ips", "text_hash",
    "signature",
]  # fmt: skip
_NUM_NAMED = 5


@dataclass(frozen=True)
class Verdicts:
    """The index of all documents in their order, with the columns `reason`, `detail` and `split` final."""

    index: pa.Table
    duplicates: list[dedup.Duplicate]
    """Numbers are rows of the index."""


def reject_bad_files(index: pa.Table, num_files: int, max_share: float) -> pa.Table:
    """Leave out every document of a damaged file.

    Raises:
        InputError: more than `max_share` of the files are damaged.
    """
    bad = index.filter(pc.equal(index["reason"], BAD_FILE))
    if bad.num_rows > max_share * num_files:
        messages = bad["detail"].to_pylist()
        more = f"\n  and {len(messages) - _NUM_NAMED} more" if len(messages) > _NUM_NAMED else ""
        raise InputError(
            f"{bad.num_rows} of {num_files} input files cannot be read:\n  " + "\n  ".join(messages[:_NUM_NAMED]) + more,
            allowed=f"max_bad_file_share={max_share:g} of the files",
            do="mend them, or raise max_bad_file_share: bad files are then left out, named and counted",
        )
    details = dict(zip(_file_keys(bad), bad["detail"].to_pylist(), strict=True))
    columns = zip(_file_keys(index), index["reason"].to_pylist(), index["detail"].to_pylist(), strict=True)
    final = [(BAD_FILE, details[key]) if key in details else (reason, detail) for key, reason, detail in columns]
    return _replace(index, reason=[reason for reason, _ in final], detail=[detail for _, detail in final])


def decide(index: pa.Table, threshold: float, heldout_share: float) -> Verdicts:
    """Remove duplicates and split the rest by the hash of their place.

    Raises:
        InputError: nothing is left to train on, or nothing is held out.
    """
    duplicates = _find_duplicates(index, threshold)
    doc_ids = index["doc_id"].to_numpy()
    reasons, details = index["reason"].to_pylist(), index["detail"].to_pylist()
    for found in duplicates:
        reasons[found.removed] = "exact_duplicate" if found.is_exact else "near_duplicate"
        details[found.removed] = f"{found.similarity:.2f} like {doc_ids[found.kept]}"
    is_heldout = doc_ids.astype(np.float64) < heldout_share * 2.0**64
    splits = np.where([reason is not None for reason in reasons], "rejects", np.where(is_heldout, "heldout", "train"))
    _check_not_empty(splits, reasons, heldout_share)
    return Verdicts(_replace(index, reason=reasons, detail=details, split=splits.tolist()), duplicates)


def _find_duplicates(index: pa.Table, threshold: float) -> list[dedup.Duplicate]:
    is_accepted = pc.is_null(index["reason"])
    rows = np.flatnonzero(is_accepted.to_numpy())
    accepted = index.filter(is_accepted)
    signatures_NP = np.frombuffer(b"".join(accepted["signature"].to_pylist()), dtype=np.uint32)
    found = dedup.find_duplicates(
        signatures_NP.reshape(len(rows), dedup.NUM_PERMUTATIONS),
        accepted["text_hash"].to_numpy(),
        accepted["num_chars"].to_numpy(),
        threshold,
    )
    return [replace(item, removed=int(rows[item.removed]), kept=int(rows[item.kept])) for item in found]


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
