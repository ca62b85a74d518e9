"""Seconds and peak memory of curation and of tokens against the size of the corpus: once, twice, four and eight times a folder.

PYTHONPATH=platform python benchmarks/corpora_scaling.py runs/demo/texts/books [--sizes 1 2 4 8] [--megabytes 5]

A copy of a text keeps a quarter of its sections with one word in 200 changed, so that they are near-duplicates, and has the
lines of the others in another order, so that they are other texts with the same words. All runs share one Ray on this machine
with two workers, which a first small run warms up. `seconds = a + b * megabytes` is fitted to each stage: b is what counts, a
is starting workers. Memory is what a process has for itself (resident less shared), sampled five times a second: of the driver,
which keeps what it once had, and of the largest worker.

What the driver needs for each document is measured apart, in a process for each number of documents: the decision over the
index of the largest run, repeated, with random signatures of which a tenth are near-duplicates. Its bytes a document are the
slope between the numbers; what lies in files that are mapped into memory is shared, and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray

from measuring import in_own_process
from powerhouse.artifacts import Artifact
from powerhouse.corpora.dedup import NUM_PERMUTATIONS
from powerhouse.corpora.pipeline import CurateConfig, curate, map_index
from powerhouse.corpora.report import make_report
from powerhouse.corpora.steps import make_corpus_steps
from powerhouse.corpora.tokens import TokensConfig, make_tokens
from powerhouse.corpora.verdict import decide

RESULTS = Path(__file__).parent / "results" / "corpora_scaling.json"
STAGES = ("documents", "corpus", "tokens")
SECTION_LINES = 400
NUM_DOCUMENTS = (100_000, 200_000, 400_000)


def write_copies(source: Path, folder: Path, num_copies: int, max_bytes: int) -> int:
    """Write the text files up to `max_bytes` that many times; give the bytes written."""
    num_bytes, taken = 0, 0
    for path in sorted(source.rglob("*.txt")):
        taken += path.stat().st_size
        if taken > max_bytes:
            break
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for copy in range(num_copies):
            text = "".join(changed(lines, Random(f"{copy} {path.name}")) if copy else lines)
            (folder / f"copy-{copy}").mkdir(parents=True, exist_ok=True)
            num_bytes += (folder / f"copy-{copy}" / path.name).write_text(text, encoding="utf-8")
    return num_bytes


def changed(lines: list[str], rng: Random) -> Iterator[str]:
    """Give the lines of another edition: some sections nearly as they were, the others shuffled."""
    for start in range(0, len(lines), SECTION_LINES):
        section = lines[start : start + SECTION_LINES]
        if rng.random() < 0.25:
            yield from (" ".join("else" if rng.random() < 1 / 200 else word for word in line.split(" ")) for line in section)
        else:
            yield from rng.sample(section, len(section))


@contextmanager
def sampled_memory() -> Iterator[dict[str, float]]:
    """Fill in the peaks of this process and of the largest worker, until the block ends."""
    peaks = {"driver_bytes": 0.0, "worker_bytes": 0.0}
    is_done = threading.Event()

    def sample() -> None:
        process = psutil.Process()
        while not is_done.wait(0.2):
            peaks["driver_bytes"] = max(peaks["driver_bytes"], _own_bytes(process))
            workers = [_own_bytes(child) for child in process.children(recursive=True) if _is_worker(child)]
            peaks["worker_bytes"] = max([peaks["worker_bytes"], *workers])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        is_done.set()
        thread.join()


def _own_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - memory.shared)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::")
    except (psutil.Error, IndexError):
        return False


def measure(source: Path, num_copies: int, max_bytes: int, index: Path) -> dict[str, Any]:
    """Run all stages on that many copies; the index of the documents is left in `index`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bytes = write_copies(source, folder / "texts", num_copies, max_bytes)
        inputs = [{"name": "books", "kind": "book", "path": folder / "texts"}]
        corpus = CurateConfig.model_validate({"inputs": inputs, "output": folder / "corpus"})
        tokens = TokensConfig(corpus=folder / "corpus", output=folder / "tokens", vocab_size=4096)
        with sampled_memory() as peaks:
            found = {"corpus": curate(corpus), "tokens": make_tokens(tokens)}
        found["documents"] = Artifact.open(folder / "corpus_documents", "documents")
        paths = sorted((folder / "corpus_documents").glob("*.parquet"))
        tables = [pq.read_table(path) for path in paths]
        pq.write_table(pa.concat_tables(table.drop_columns(["text"]) for table in tables), index)
        removed = json.loads((folder / "corpus" / "report.json").read_text())["duplicates"]
        return {
            "input_bytes": num_bytes,
            "num_documents": found["documents"].manifest.counts["num_documents"],
            "num_near_duplicates": removed["near"],
            **peaks,
            "seconds": {stage: found[stage].manifest.seconds for stage in STAGES},
        }


def fit(rows: list[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """Fit seconds = a + b * megabytes; with the share of the variance that the line explains."""
    megabytes, taken = np.array([row["input_bytes"] / 1e6 for row in rows]), np.array([seconds(row) for row in rows])
    slope, start = np.polyfit(megabytes, taken, 1)
    rest = taken - start - slope * megabytes
    return {"a_s": float(start), "b_s_per_mb": float(slope), "r2": float(1 - rest @ rest / ((taken - taken.mean()) ** 2).sum())}


def write_index(index: Path, folder: Path, num_documents: int) -> None:
    """Write that many documents in parts: those of the index again and again, a tenth with the signature of another."""
    table = pq.read_table(index).slice(0, num_documents // 20)
    rng = np.random.default_rng(0)
    folder.mkdir()
    for first in range(0, num_documents, len(table)):
        size = len(table)
        if first % (10 * size) != size:  # of ten blocks, the second repeats the first
            signatures = rng.integers(0, 2**32, (size, NUM_PERMUTATIONS), dtype=np.uint32)
        else:
            signatures[:, 20:30] = 5
        fresh = {
            "order": pa.array(np.arange(first, first + size)),
            "doc_id": pa.array(rng.integers(0, 2**64, size, dtype=np.uint64)),
            "text_hash": pa.array(rng.integers(0, 2**64, size, dtype=np.uint64)),
            "signature": pa.array([row.tobytes() for row in signatures], type=pa.binary(4 * NUM_PERMUTATIONS)),
        }
        for name, column in fresh.items():
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, folder / f"{first:09d}.parquet")


def measure_driver(index: Path, num_documents: int) -> dict[str, float]:
    """Map the index of that many documents and decide, as curation does; give seconds, and the bytes that this took."""
    with tempfile.TemporaryDirectory(dir=index.parent) as temporary, sampled_memory() as peaks:
        folder = Path(temporary)
        write_index(index, folder / "index", num_documents)
        before = _own_bytes(psutil.Process())
        peaks["driver_bytes"] = 0
        config = CurateConfig.model_validate({"inputs": [{"name": "books", "kind": "book", "path": "."}], "output": "."})
        start = time.monotonic()
        table = map_index(pads.dataset(folder / "index"), folder / "index.arrow")
        verdicts = decide(table, make_corpus_steps(config, folder), 0.05, {"books": 1.0})
        make_report(verdicts, defaultdict(str), config.quality)
        seconds = time.monotonic() - start
        return {"seconds": seconds, "index_bytes": table.nbytes, "peak_bytes": peaks["driver_bytes"] - before}


def show(rows: list[dict[str, Any]], fits: dict[str, dict[str, float]], driver: list[dict[str, float]]) -> None:
    print(
        f"{'input':>9} {'documents':>9} {'near':>6} | "
        + " ".join(f"{stage:>9}" for stage in STAGES)
        + "  s | driver  worker MB"
    )
    for row in rows:
        cells = " ".join(f"{row['seconds'][stage]:9.1f}" for stage in STAGES)
        size = f"{row['input_bytes'] / 1e6:6.1f} MB {row['num_documents']:9,} {row['num_near_duplicates']:6,}"
        print(f"{size} | {cells}    | {row['driver_bytes'] / 1e6:6.0f} {row['worker_bytes'] / 1e6:7.0f}")
    for stage, line in fits.items():
        print("{:>9}: {a_s:.1f} s + {b_s_per_mb:.3f} s a megabyte, R2 {r2:.4f}".format(stage, **line))
    for item in driver:
        print(f"driver, {item['num_documents']:,} documents: {item['seconds']:.1f} s, peak {item['peak_bytes'] / 1e6:,.0f} MB")
    for one, other in pairwise(driver):
        more = other["num_documents"] - one["num_documents"]
        peak, index = ((other[name] - one[name]) / more for name in ("peak_bytes", "index_bytes"))
        print(f"each document more: {peak:,.0f} bytes at the peak, {index:,.0f} of them the index")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--index", type=Path, help="measure the driver alone, over this index of documents")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure_driver(Path(arguments.case["index"]), arguments.case["num_documents"])))
        raise SystemExit
    if arguments.index:
        cases = [{"index": str(arguments.index), "num_documents": number} for number in NUM_DOCUMENTS]
        driver = [case | in_own_process(__file__, case) for case in cases]
        show([], {}, driver)
        old = json.loads(RESULTS.read_text(encoding="utf-8"))
        without = [{name: value for name, value in item.items() if name != "index"} for item in driver]
        RESULTS.write_text(json.dumps(old | {"driver": without}, indent=1) + "\n", encoding="utf-8")
        raise SystemExit
    groups = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    ray.init(address="local", num_cpus=8, resources=groups, include_dashboard=False, log_to_driver=False)
    max_bytes = int(arguments.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as kept:
        index = Path(kept) / "index.parquet"
        measure(arguments.source, min(arguments.sizes), max_bytes // 8, index)
        rows = [measure(arguments.source, size, max_bytes, index) for size in arguments.sizes]
        ray.shutdown()
        cases = [{"index": str(index), "num_documents": number} for number in NUM_DOCUMENTS]
        driver = [case | in_own_process(__file__, case) for case in cases]
    fits = {stage: fit(rows, lambda row, stage=stage: row["seconds"][stage]) for stage in STAGES}  # type: ignore[misc]
    fits["all"] = fit(rows, lambda row: sum(row["seconds"].values()))
    show(rows, fits, driver)
    for item in driver:
        del item["index"]
    result = {"rows": rows, "fits": fits, "driver": driver}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
