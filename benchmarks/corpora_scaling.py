"""Seconds and peak memory of curation and of tokens against the size of the corpus: once, twice, four and eight times a folder.

PYTHONPATH=platform python benchmarks/corpora_scaling.py runs/demo/texts/books [--sizes 1 2 4 8] [--megabytes 6]

The copies beyond the first have their lines in another order, so that they are other texts with the same words. All runs share
one Ray on this machine with two workers, which a first run of the smallest size warms up. Memory is what a process has for
itself (resident less shared), sampled five times a second: of the driver, which keeps what it once had, and of the largest
worker.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random

import psutil
import ray

from powerhouse.artifacts import Artifact
from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.corpora.tokens import TokensConfig, make_tokens

RESULTS = Path(__file__).parent / "results" / "corpora_scaling.json"
STAGES = ("curate", "tokens")


def write_copies(source: Path, folder: Path, num_copies: int, max_bytes: int) -> int:
    """Write the text files up to `max_bytes` that many times; give the bytes written."""
    num_bytes, taken = 0, 0
    for path in sorted(source.rglob("*.txt")):
        taken += path.stat().st_size
        if taken > max_bytes:
            break
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for copy in range(num_copies):
            if copy:
                Random(f"{copy} {path.name}").shuffle(lines)
            (folder / f"copy-{copy}").mkdir(parents=True, exist_ok=True)
            num_bytes += (folder / f"copy-{copy}" / path.name).write_text("".join(lines), encoding="utf-8")
    return num_bytes


def run_stage(stage: Callable[[], Artifact]) -> dict[str, float]:
    """Run it to its end; give its seconds, peaks and counts."""
    with sampled_memory() as peaks:
        start = time.monotonic()
        artifact = stage()
        seconds = time.monotonic() - start
    return {"seconds": seconds} | peaks | dict(artifact.manifest.counts)


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


def measure(source: Path, num_copies: int, max_bytes: int) -> dict[str, dict[str, float]]:
    """Run both stages on that many copies."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bytes = write_copies(source, folder / "texts", num_copies, max_bytes)
        inputs = [{"name": "books", "kind": "book", "path": folder / "texts"}]
        corpus = CurateConfig.model_validate({"inputs": inputs, "output": folder / "corpus"})
        tokens = TokensConfig(corpus=folder / "corpus", output=folder / "tokens", vocab_size=4096)
        found = {"curate": run_stage(lambda: curate(corpus)), "tokens": run_stage(lambda: make_tokens(tokens))}
        return {"input": {"bytes": num_bytes}, **found}


def show(rows: list[dict[str, dict[str, float]]]) -> None:
    """Print the table, and what each further megabyte cost."""
    print(f"{'input':>9} {'documents':>9} | " + " | ".join(f"{stage:>7} s  driver MB  worker MB" for stage in STAGES))
    for row in rows:
        cells = [
            f"{row[stage]['seconds']:9.1f} {row[stage]['driver_bytes'] / 1e6:10.0f} {row[stage]['worker_bytes'] / 1e6:10.0f}"
            for stage in STAGES
        ]
        print(f"{row['input']['bytes'] / 1e6:6.1f} MB {row['curate']['num_documents']:>9,} | " + " | ".join(cells))
    for one, other in pairwise(rows):
        more = (other["input"]["bytes"] - one["input"]["bytes"]) / 1e6
        costs = [f"{stage} {(other[stage]['seconds'] - one[stage]['seconds']) / more:.2f}" for stage in STAGES]
        sizes = f"from {one['input']['bytes'] / 1e6:.0f} to {other['input']['bytes'] / 1e6:.0f} MB"
        print(f"{sizes}, seconds a megabyte: {', '.join(costs)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabytes", type=float, default=6.0)
    arguments = parser.parse_args()
    groups = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    ray.init(address="local", num_cpus=8, resources=groups, include_dashboard=False, log_to_driver=False)
    max_bytes = int(arguments.megabytes * 1e6)
    measure(arguments.source, min(arguments.sizes), max_bytes)
    results = [measure(arguments.source, size, max_bytes) for size in arguments.sizes]
    show(results)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
