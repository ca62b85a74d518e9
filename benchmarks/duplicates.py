"""The detection curve of near-duplicates beside its theory, how fast signatures are, and two ways to join the candidates.

PYTHONPATH=platform:tests python benchmarks/duplicates.py [--join]

Pairs are planted at exact Jaccard similarities of their 5-word shingles. "candidates" share a band; "removed" are candidates
whose estimated similarity reaches 0.8 as well, so a pair below that is rarely removed though it may be a candidate.

"files" is what curation does, on one core: the whole decision band by band, out of files that are mapped into memory. "shuffle"
is `repartition(keys, sort=True)` and the edges of each partition in Ray Data, on two workers, and the components; it verifies
nothing. Memory is what a process has for itself, over what it had before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import datasketch
import numpy as np
import psutil
import pyarrow as pa
from corpora_scaling import _own_bytes, sampled_memory

from measuring import device_name, in_own_process
from planted import near_duplicates
from powerhouse.corpora import dedup

NUM_PAIRS = 400
THRESHOLD = 0.8
STEP = 50_000
NUM_DOCUMENTS = {"shuffle": (1_000_000,), "files": (250_000, 500_000, 1_000_000)}
NUM_PARTITIONS = 16
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


def make_signatures(first: int, num: int) -> dedup.Signatures:
    """Give random signatures, a tenth of them of near-duplicates, and a template that some hundreds of each 50,000 share."""
    signatures = np.random.default_rng(first).integers(0, 2**32, (num, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    copies = num // 10
    signatures[:copies] = signatures[copies : 2 * copies]
    signatures[:copies, 20:30] = 5
    signatures[: 2 * copies : 50, :8] = 7
    return signatures


def measure_files(num_documents: int) -> dict[str, float]:
    """Make the whole decision as curation does, out of files: keys, join, components, verification."""
    parts = (make_signatures(first, min(STEP, num_documents - first)) for first in range(0, num_documents, STEP))
    hashes, lengths = np.arange(num_documents, dtype=np.uint64), np.full(num_documents, 9)
    before = _own_bytes(psutil.Process())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, sampled_memory() as peaks:
        start = time.perf_counter()
        num_removed = sum(1 for _ in dedup.find_duplicates(parts, hashes, lengths, THRESHOLD, Path(folder)))
        seconds = time.perf_counter() - start
    return {"removed": num_removed, "seconds": seconds, "driver_bytes": peaks["driver_bytes"] - before}


def measure_shuffle(num_documents: int) -> dict[str, float]:
    """Make the keys and join them by Ray Data's shuffle on two workers, and the components here; nothing is verified."""
    import ray.data

    def keys_of(row: dict[str, Any]) -> dict[str, Any]:
        first, num = int(row["first"][0]), int(row["num"][0])
        keys_BN = dedup.band_keys(make_signatures(first, num))
        return {"key": keys_BN.ravel(), "document": np.tile(np.arange(first, first + num), dedup.NUM_BANDS)}

    def edges_of(part: pa.Table) -> pa.Table:
        left, right = dedup.edges(part["key"].to_numpy(), part["document"].to_numpy())
        return pa.table({"left": left, "right": right})

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.range(2).map(lambda row: row).materialize()
    parts = [{"first": first, "num": min(STEP, num_documents - first)} for first in range(0, num_documents, STEP)]
    before = _own_bytes(psutil.Process())
    with sampled_memory() as peaks:
        start = time.perf_counter()
        rows = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(keys_of, batch_size=1)
        rows = rows.repartition(NUM_PARTITIONS, keys=["key"], sort=True)
        rows = rows.map_batches(edges_of, batch_size=None, batch_format="pyarrow")
        found = pa.concat_tables(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
        num_clusters = sum(1 for _ in dedup.clusters(num_documents, [(found["left"].to_numpy(), found["right"].to_numpy())]))
        seconds = time.perf_counter() - start
    ray.shutdown()
    peaks["driver_bytes"] -= before
    return {"edges": found.num_rows, "clusters": num_clusters, "seconds": seconds, **peaks}


def measure_join() -> dict[str, list[dict[str, Any]]]:
    """Give seconds and peak memory of both ways, each number of documents in a process of its own."""
    found: dict[str, list[dict[str, Any]]] = {how: [] for how in NUM_DOCUMENTS}
    for how, rows in found.items():
        for num_documents in NUM_DOCUMENTS[how]:
            rows.append({"documents": num_documents} | in_own_process(__file__, {"how": how, "num_documents": num_documents}))
            told = ", ".join(f"{name} {value:,.1f}" for name, value in rows[-1].items())
            print(f"{how}: {told}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", action="store_true", help="measure the join alone")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure_case = {"files": measure_files, "shuffle": measure_shuffle}[arguments.case["how"]]
        print(json.dumps(measure_case(arguments.case["num_documents"])))
        raise SystemExit
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if arguments.join else {}
    if not arguments.join:
        result["curve"] = measure_curve()
        print(f"{'Jaccard':>8} {'theory':>8} {'candidates':>11} {'+-':>6} {'removed':>8} {'RMSE of the estimate':>21}")
        line = "{jaccard:8.3f} {theory:8.3f} {candidates:11.3f} {standard_error:6.3f} {removed:8.3f} {estimate_rmse:21.3f}"
        for row in result["curve"]:
            print(line.format(**row))
        result["signatures"] = measure_signatures()
        told = "signatures a second of 300 words, one core: {ours_per_s:,.0f}, datasketch {datasketch_per_s:,.0f}"
        print(told.format(**result["signatures"]))
    result |= {"join": measure_join(), "device": device_name()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
