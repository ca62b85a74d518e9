"""Near-duplicates, and the whole chain from .jsonl to clean text, in datatrove and here: the same documents, one core each.

    PYTHONPATH=platform python benchmarks/corpora_chain_vs_datatrove.py --peer ... --texts ... --pages ...   # as its sibling

"duplicates": read, sign (words' 5-grams, 14 bands of 8), find, write what is left. "chain": the rules of Gopher, C4 and FineWeb
before that; here language and toxicity are scored as well. Each side is one process with one thread, the one after the other;
time is its CPU time, which the rest of the machine stretches for both. datatrove removes what shares a band, by chains of any
length; here a document goes only if it is 0.8 alike to the one that stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from corpora_vs_datatrove import add_arguments, machine, one_thread, peak_rss_mib, print_table, read_texts

RESULTS = Path(__file__).parent / "results" / "corpora_chain_vs_datatrove.json"
THRESHOLD = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num-duplicates", type=int, default=20_000, help="in how many of them duplicates are looked for")
    parser.add_argument("--num-chain", type=int, default=5000, help="how many of them go through the whole chain")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--run", nargs=3, metavar=("SIDE", "PART", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        side, part, folder = arguments.run
        print(json.dumps((theirs if side == "datatrove" else ours)(part, Path(folder))))
        return
    texts = read_texts(arguments.texts, arguments.pages, arguments.num_documents)
    report: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine()}
    for part, num in (("duplicates", arguments.num_duplicates), ("chain", arguments.num_chain)):
        report[part] = measure(part, texts[:num], arguments.peer)
        print(json.dumps(report[part], indent=1))
        print_table(f"{part}, {report[part]['num_documents']} documents", report[part]["sides"])
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(part: str, texts: list[str], peer: str) -> dict[str, Any]:
    num_mb = sum(map(len, texts)) / 1e6
    found, sides = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, python in (("datatrove", peer), ("powerhouse", sys.executable)):
            folder = Path(temporary, side)
            (folder / "input").mkdir(parents=True)
            with (folder / "input" / "documents.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
            found[side] = run(python, side, part, folder)
            seconds = sum(found[side]["cpu_seconds"].values())
            sides[side] = {
                "cpu_seconds": round(seconds, 2),
                "documents_per_second_per_core": round(len(texts) / seconds, 1),
                "mb_per_second_per_core": round(num_mb / seconds, 3),
                "peak_rss_mib": round(found[side]["peak_rss_mib"]),
                "kept": len(found[side]["kept"]),
                "seconds_by_step": {name: round(value, 2) for name, value in found[side]["cpu_seconds"].items()},
            }
        explained = explain(found, Path(temporary, "powerhouse")) if part == "duplicates" else {}
    kept = {side: set(found[side]["kept"]) for side in sides}
    return {
        "num_documents": len(texts),
        "mb": round(num_mb, 2),
        "sides": sides,
        "times_faster": round(sides["datatrove"]["cpu_seconds"] / sides["powerhouse"]["cpu_seconds"], 2),
        "same_verdict_share": round(1 - len(kept["datatrove"] ^ kept["powerhouse"]) / len(texts), 5),
    } | explained


def run(python: str, side: str, part: str, folder: Path) -> dict[str, Any]:
    command = [python, __file__, "--run", side, part, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        sys.exit(f"{side}, {part}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


class Clock:
    """CPU seconds of this process by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.seconds[name] = time.process_time() - begin

    def answer(self, **found: Any) -> dict[str, Any]:
        return {"cpu_seconds": self.seconds, "peak_rss_mib": peak_rss_mib()} | found


def theirs(part: str, folder: Path) -> dict[str, Any]:
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    load_word_tokenizer("eng").word_tokenize("Loaded before the clock starts.")
    at = {name: str(folder / name) for name in ("input", "filtered", "signatures", "buckets", "removed", "output")}
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    clock = Clock()
    if part == "chain":
        filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False)]
        with clock.step("rules"):
            pipe([JsonlReader(at["input"]), *filters, FineWebQualityFilter(), JsonlWriter(at["filtered"], compression=None)])
    source = at["filtered"] if part == "chain" else at["input"]
    with clock.step("sign"):
        pipe([JsonlReader(source), MinhashDedupSignature(at["signatures"], config)])
    with clock.step("find"):
        for bucket in range(config.num_buckets):
            pipe([MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)], bucket, config.num_buckets)
        pipe([MinhashDedupCluster(at["buckets"], at["removed"], config=config)])
    with clock.step("write"):
        pipe([JsonlReader(source), MinhashDedupFilter(at["removed"]), JsonlWriter(at["output"], compression=None)])
    lines = (line for path in Path(at["output"]).glob("*.jsonl") for line in path.open(encoding="utf-8"))
    return clock.answer(kept=sorted(int(json.loads(line)["id"]) for line in lines))


def pipe(steps: list[Any], rank: int = 0, world_size: int = 1) -> None:
    data = None
    for step in steps:
        data = step(data, rank, world_size)
    if data is not None:
        deque(data, maxlen=0)


def ours(part: str, folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as pads
    import pyarrow.parquet as pq

    from powerhouse.corpora.dedup import RemoveDuplicates, Sign
    from powerhouse.corpora.filters import Cut, QualityConfig
    from powerhouse.corpora.language import Language
    from powerhouse.corpora.process import DocumentProcessor, read_files
    from powerhouse.corpora.scores import Score
    from powerhouse.corpora.sources import SourceConfig, list_files
    from powerhouse.corpora.toxicity import Toxicity

    steps = [Score(), Language(), Toxicity(), Sign()] if part == "chain" else [Sign()]
    process = DocumentProcessor(steps, extract_timeout_s=10)
    files = list_files([SourceConfig(name="input", kind="web", path=str(folder / "input"))])
    clock = Clock()
    (folder / "documents").mkdir()
    with clock.step("read, score, sign"):
        for number, raw in enumerate(read_files(files, chunk_chars=4000)):
            pq.write_table(process(raw), folder / "documents" / f"{number:05d}.parquet", compression="zstd")
    with clock.step("decide"):
        dataset = pads.dataset(folder / "documents")
        index = dataset.to_table(columns=[name for name in dataset.schema.names if name != "text"]).sort_by("order")
        everything = (
            {"languages": pc.unique(index["language"].drop_null()).to_pylist(), "min_language_score": 0}
            if part == "chain"
            else {}
        )
        limits = QualityConfig(max_toxic_word_share=1, max_worst_sentence_toxic_share=1, **everything)
        reasons = index["reason"].to_pylist()
        twins = {}
        for step in [*([Cut(limits)] if part == "chain" else []), RemoveDuplicates(THRESHOLD, 1.0)]:
            for removal in step(index).removals:
                reasons[removal.row] = removal.reason
                twins[removal.row] = removal.twin
            place = index.column_names.index("reason")
            index = index.set_column(place, "reason", pa.array(reasons, type=pa.string()))
    with clock.step("write"):
        kept = pc.is_null(index["reason"])
        is_kept = pc.field("order").isin(index["order"].filter(kept))
        table = dataset.to_table(columns=["order", "text"], filter=is_kept).sort_by("order")
        pq.write_table(table, folder / "kept.parquet", compression="zstd")
    return clock.answer(kept=pc.indices_nonzero(kept).to_pylist(), twins=twins)


def explain(found: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Say of every document that one side alone removes why."""
    import numpy as np
    import pyarrow.dataset as pads

    from powerhouse.corpora.dedup import read_signatures, similarity

    index = pads.dataset(folder / "documents").to_table(columns=["order", "reason", "signature"]).sort_by("order")
    signatures_NP = np.concatenate([*read_signatures(index["signature"], np.ones(index.num_rows, dtype=bool))])
    kept = {side: set(answer["kept"]) for side, answer in found.items()}
    twins = {int(row): twin for row, twin in found["powerhouse"]["twins"].items()}
    reasons = index["reason"].to_pylist()

    def most_alike(number: int, among: Callable[[int], bool]) -> float:
        estimates = similarity(signatures_NP, signatures_NP[number])
        others = [other for other in np.argsort(-estimates)[:200].tolist() if other != number and among(other)]
        return float(estimates[others[0]]) if others else 0.0

    def why_there(number: int) -> str:
        if number in twins.values():
            return "another of its cluster stays there: the first, here the longest"
        if most_alike(number, kept["powerhouse"].__contains__) >= THRESHOLD:
            return "alike to one that stays, but here they share no band"
        best = most_alike(number, lambda _: True)
        return "a band is shared, but none is 0.8 alike" if best < THRESHOLD else "alike only to one that goes too"

    def why_here(number: int) -> str:
        if number not in twins:
            return reasons[number]
        if twins[number] not in kept["datatrove"]:
            return "another of its cluster stays there: the first, here the longest"
        return "alike to one that stays, but there they share no band"

    only_there = Counter(why_there(number) for number in sorted(kept["powerhouse"] - kept["datatrove"]))
    only_here = Counter(why_here(number) for number in sorted(kept["datatrove"] - kept["powerhouse"]))
    return {"removed_only_by_datatrove": dict(only_there), "removed_only_here": dict(only_here)}


if __name__ == "__main__":
    main()
