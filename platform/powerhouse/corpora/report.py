"""What a curation run did, in numbers and a few samples: plain values for report.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from powerhouse.corpora.document import Removal
from powerhouse.corpora.filters import RULES, QualityConfig
from powerhouse.corpora.process import BAD_FILE
from powerhouse.corpora.verdict import Verdicts

_NUM_PAIRS = 8
_NUM_STEPS = 30
_NUM_REJECTS_PER_REASON = 2
_SNIPPET_CHARS = 300
_COUNTED = ["reason", "num_chars", "split"]


def sampled_rows(verdicts: Verdicts) -> list[int]:
    """Give the rows of the index whose text the report shows."""
    pairs = [row for found in _sample_pairs(verdicts) for row in (found.twin, found.row) if row is not None]
    return sorted({*pairs, *(row for rows in _sample_rejects(verdicts).values() for row in rows)})


def make_report(verdicts: Verdicts, texts: Mapping[int, str], limits: QualityConfig) -> dict[str, Any]:
    """Put the whole report together; `texts` maps the rows of `sampled_rows` to their text."""
    index = verdicts.index
    return {
        "sources": dict(_funnels(index)),
        "total": _funnel(index),
        "histograms": dict(_histograms(index, limits)),
        **verdicts.sections,
        "pairs": _describe_pairs(verdicts, texts),
        "rejects": {
            reason: [_place(index, row) | {"detail": index["detail"][row].as_py(), "text": _cut(texts[row])} for row in rows]
            for reason, rows in _sample_rejects(verdicts).items()
        },
        "bad_files": _bad_files(index),
    }


def _funnels(index: pa.Table) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in pc.unique(index["source"]).to_pylist():
        yield name, _funnel(index.select(_COUNTED).filter(pc.equal(index["source"], name)))


def _funnel(index: pa.Table) -> dict[str, Any]:
    counts = {item["values"]: item["counts"] for item in pc.value_counts(index["reason"].drop_null()).to_pylist()}
    out: dict[str, Any] = {"documents": index.num_rows, "chars": pc.sum(index["num_chars"]).as_py()}
    out["removed"] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    for split in ("train", "heldout"):
        chars = index["num_chars"].filter(pc.equal(index["split"], split))
        out[split] = {"documents": len(chars), "chars": pc.sum(chars).as_py() or 0}
    return out


def _histograms(index: pa.Table, limits: QualityConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Count the kept and the removed documents in 30 steps of every score that is not the same for all."""
    is_removed = pc.is_valid(index["reason"]).to_numpy()
    for name in ("num_chars", *dict.fromkeys(rule.score for rule in RULES if rule.score in index.column_names)):
        values = index[name].to_numpy().astype(np.float64)
        is_known = np.isfinite(values)
        if not is_known.any():
            continue
        low, high = np.quantile(values[is_known], [0.005, 0.995])
        if low == high:
            continue
        counts = [
            np.histogram(np.clip(values[is_known & is_in], low, high), _NUM_STEPS, (low, high))[0].tolist()
            for is_in in (~is_removed, is_removed)
        ]
        edges = [float(getattr(limits, rule.limit)) for rule in RULES if rule.score == name]
        ends = {"low": round(float(low), 6), "high": round(float(high), 6)}
        yield name, ends | {"limits": edges, "kept": counts[0], "removed": counts[1]}


def _describe_pairs(verdicts: Verdicts, texts: Mapping[int, str]) -> list[dict[str, Any]]:
    return [
        {
            "similarity": round(found.similarity or 0.0, 3),
            "reason": found.reason,
            "kept": _place(verdicts.index, found.twin or 0) | {"text": _cut(texts[found.twin or 0])},
            "removed": _place(verdicts.index, found.row) | {"text": _cut(texts[found.row])},
        }
        for found in _sample_pairs(verdicts)
    ]


def _sample_pairs(verdicts: Verdicts) -> list[Removal]:
    """The least similar pairs first: those are the ones to look at."""
    return sorted(verdicts.twins, key=lambda found: (found.similarity or 0.0, found.row))[:_NUM_PAIRS]


def _sample_rejects(verdicts: Verdicts) -> dict[str, list[int]]:
    """The documents of each reason with the lowest ids, which are hashes: a random choice that is the same on every run."""
    ids, reasons = verdicts.index["doc_id"].to_numpy(), verdicts.index["reason"]
    rows: dict[str, list[int]] = {}
    for reason in sorted(pc.unique(reasons.drop_null()).to_pylist()):
        found = np.flatnonzero(pc.fill_null(pc.equal(reasons, reason), False).to_numpy())
        rows[reason] = found[np.argsort(ids[found], kind="stable")][:_NUM_REJECTS_PER_REASON].tolist()
    return rows


def _bad_files(index: pa.Table) -> list[dict[str, str]]:
    bad = index.select(["source", "path", "detail"]).filter(pc.equal(index["reason"], BAD_FILE))
    return list({(row["source"], row["path"]): row for row in bad.to_pylist()}.values())


def _place(index: pa.Table, row: int) -> dict[str, Any]:
    return {name: index[name][row].as_py() for name in ("source", "path", "doc_id")}


def _cut(text: str) -> str:
    return text if len(text) <= _SNIPPET_CHARS else text[:_SNIPPET_CHARS] + "…"
