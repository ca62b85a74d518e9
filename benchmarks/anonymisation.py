"""Precision and recall of anonymisation by kind, on planted texts with look-alikes among them; and what it costs.

PYTHONPATH=platform:tests python benchmarks/anonymisation.py [folder with parquet files that have a column `text`]

A find is right if it has the kind and the very characters that were planted. Everything else that is found, in any text, is
wrong. With a folder of real text the last lines tell its speed on one core, and some finds in their context to judge by eye.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.dataset as pads

from planted import personal_data
from powerhouse.corpora.redact import KINDS, find

NUM_SEEDS = 5
NUM_SHOWN = 6
RESULTS = Path(__file__).parent / "results" / "anonymisation.json"


def measure() -> dict[str, dict[str, float]]:
    """Give the counts and both scores of each kind."""
    planted, alike, found, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for case in (case for seed in range(NUM_SEEDS) for case in personal_data(seed)):
        start = case.text.index(case.value)
        spans = find(case.text, "US")
        (planted if case.is_personal else alike)[case.kind] += 1
        found.update(kind for _, _, kind in spans)
        right[case.kind] += case.is_personal and (start, start + len(case.value), case.kind) in spans
    return {
        kind: {
            "num_personal": planted[kind],
            "num_alike": alike[kind],
            "num_found": found[kind],
            "precision": right[kind] / found[kind],
            "recall": right[kind] / planted[kind],
        }
        for kind in KINDS
    }


def show(scores: dict[str, dict[str, float]]) -> None:
    """Print them as a table."""
    print(f"{'kind':<12} {'personal':>9} {'alike':>7} {'found':>7} {'precision':>10} {'recall':>7}")
    for kind, score in scores.items():
        numbers = "{num_personal:>9} {num_alike:>7} {num_found:>7} {precision:>10.3f} {recall:>7.3f}".format(**score)
        print(f"{kind:<12} {numbers}")


def read_through(folder: Path) -> dict[str, float]:
    """Print what is found in real texts, and how fast."""
    texts = pads.dataset(folder).to_table(columns=["text"])["text"].to_pylist()
    start = time.process_time()
    finds = [find(text, "US") for text in texts]
    seconds = time.process_time() - start
    shown = defaultdict(list)
    for text, spans in zip(texts, finds, strict=True):
        for first, last, kind in spans:
            shown[kind].append(" ".join(text[max(0, first - 30) : last + 10].split()))
    for kind, contexts in shown.items():
        print(f"\n{kind}: {len(contexts)} in {len(texts)} documents")
        for context in contexts[:: max(1, len(contexts) // NUM_SHOWN)][:NUM_SHOWN]:
            print(f"    {context}")
    num_mb = sum(map(len, texts)) / 1e6
    speeds = f"{len(texts) / seconds:.0f} documents/s, {num_mb / seconds:.1f} MB/s"
    print(f"\n{len(texts)} documents, {num_mb:.1f} MB: {speeds} on one core")
    return {"num_documents": len(texts), "num_mb": num_mb, "seconds": seconds}


if __name__ == "__main__":
    result: dict[str, object] = {"planted": measure()}
    show(result["planted"])  # type: ignore[arg-type]
    if len(sys.argv) > 1:
        result["real"] = read_through(Path(sys.argv[1]))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
