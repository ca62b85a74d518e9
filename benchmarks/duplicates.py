"""The detection curve of near-duplicates beside its theory, and how fast signatures and the join of candidates are.

PYTHONPATH=platform:tests python benchmarks/duplicates.py

Pairs are planted at exact Jaccard similarities of their 5-word shingles. "candidates" share a band; "removed" are candidates
whose estimated similarity reaches 0.8 as well, so a pair below that is rarely removed though it may be a candidate.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import datasketch
import numpy as np

from planted import near_duplicates
from powerhouse.corpora import dedup

NUM_PAIRS = 400
THRESHOLD = 0.8
RESULTS = Path(__file__).parent / "results" / "duplicates.json"


def measure_curve() -> list[dict[str, float]]:
    """Give the shares of planted pairs that are found, beside what the formula says of their exact similarities."""
    rows = []
    for jaccard in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        pairs = near_duplicates(jaccard, NUM_PAIRS)
        signatures = np.stack([dedup.signature(text) for one, other, _ in pairs for text in (one, other)])
        exact = np.array([similarity for *_, similarity in pairs])
        keys = dedup.band_keys(signatures)
        is_candidate = (keys[:, ::2] == keys[:, 1::2]).any(axis=0)
        estimates = dedup.similarity(signatures[::2], signatures[1::2])
        theory = np.mean([dedup.detection_probability(similarity) for similarity in exact])
        rows.append(
            {
                "jaccard": float(exact.mean()),
                "theory": float(theory),
                "candidates": float(is_candidate.mean()),
                "standard_error": math.sqrt(theory * (1 - theory) / NUM_PAIRS),
                "removed": float((is_candidate & (estimates >= THRESHOLD)).mean()),
                "estimate_rmse": float(np.sqrt(np.mean((estimates - exact) ** 2))),
            }
        )
    return rows


def measure_signatures() -> dict[str, float]:
    """Give signatures a second on one core, here and in datasketch, from words on."""
    texts = [text for one, other, _ in near_duplicates(0.8, 150, num_words=300) for text in (one, other)]
    start = time.process_time()
    for text in texts:
        dedup.signature(text)
    ours = time.process_time() - start
    start = time.process_time()
    for text in texts:
        sketch = datasketch.MinHash(num_perm=dedup.NUM_PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in dedup.shingles(text)])
    return {"ours_per_s": len(texts) / ours, "datasketch_per_s": len(texts) / (time.process_time() - start)}


def measure_join() -> list[dict[str, float]]:
    """Give seconds and peak memory of the whole decision over random signatures, a tenth of them near-duplicates."""
    rows = []
    for num_documents in (125_000, 250_000, 500_000, 1_000_000):
        rng = np.random.default_rng(0)
        signatures = rng.integers(0, 2**32, (num_documents, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
        copies = num_documents // 10
        signatures[:copies] = signatures[copies : 2 * copies]
        signatures[:copies, 20:30] = 5
        signatures[: 2 * copies : 50, :8] = 7  # a template: one large cluster of texts that are not alike
        start = time.perf_counter()
        found = dedup.find_duplicates(
            signatures, np.arange(num_documents, dtype=np.uint64), np.full(num_documents, 9), THRESHOLD
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"documents": num_documents, "removed": len(found), "seconds": seconds, "peak_bytes": peak})
        print(f"{num_documents:>9,} documents  {len(found):>7,} removed  {seconds:6.1f} s  peak {peak / 2**30:5.2f} GiB")
    return rows


if __name__ == "__main__":
    curve = measure_curve()
    print(f"{'Jaccard':>8} {'theory':>8} {'candidates':>11} {'+-':>6} {'removed':>8} {'RMSE of the estimate':>21}")
    for row in curve:
        print(
            "{jaccard:8.3f} {theory:8.3f} {candidates:11.3f} {standard_error:6.3f} {removed:8.3f} {estimate_rmse:21.3f}".format(
                **row
            )
        )
    speeds = measure_signatures()
    print(
        "\nsignatures a second of 300 words, one core: {ours_per_s:,.0f}, datasketch {datasketch_per_s:,.0f}\n".format(**speeds)
    )
    result = {"curve": curve, "signatures": speeds, "join": measure_join()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
