"""From folders of books, web pages and Wikipedia dumps to a clean corpus. [Ray]

    read ─> extract ─> anonymise ─> score ─> sign ─> │ ─> quality ─> duplicates ─> split ─> write
    └───────── scored.py: actors and tasks ────────┘        └────── driver ──────┘         tasks

Every document has a place in one order of the whole corpus, which the names of the input files alone decide. So neither the
number of workers nor the order in which they finish changes a byte of the result. Text is never shuffled and never on the
driver, which decides over an index of the scores that lies in a file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray.data
from pydantic import Field

import powerhouse
from powerhouse.artifacts import Artifact, produce, replacing, write_atomically
from powerhouse.config import StoragePath
from powerhouse.corpora.page import render_page
from powerhouse.corpora.parts import Part, list_parts, parts_holding
from powerhouse.corpora.repeats import drop_lines
from powerhouse.corpora.report import make_report, sampled_rows
from powerhouse.corpora.scored import score_documents
from powerhouse.corpora.session import WorkersConfig, connect, worker_failures
from powerhouse.corpora.sources import list_files
from powerhouse.corpora.steps import CorpusStepsConfig, DocumentsConfig, make_corpus_steps
from powerhouse.corpora.verdict import SPLITS, Verdicts, decide, reject_bad_files
from powerhouse.telemetry import make_logger, progress

_INDEX = "index.arrow"
_PLAN = "plan.txt"
_COLUMNS = ["doc_id", "source", "kind", "path", "offset", "text"]

_ROWS_PER_GROUP = 2**14
"""A task reads only the groups of decisions that its range touches."""


class CurateConfig(DocumentsConfig, CorpusStepsConfig):
    """Settings of jobs/curate_corpus.py."""

    output: StoragePath
    """Folder of the corpus: train/, heldout/ and rejects/ as parquet, report.json, report.html. All documents with their scores
    lie beside it, in OUTPUT_documents."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents that no model trains on, chosen by the hash of the document's place."""
    max_bad_file_share: float = Field(default=0.0, ge=0, le=1)
    """Up to this share of files may be damaged: they are left out, named in the report. Above it the job fails."""
    num_documents_per_file: int = Field(default=1000, ge=1)
    """Input documents behind one parquet file of each split."""
    workers: WorkersConfig = WorkersConfig()
    """How much of the cluster to take."""


def curate(config: CurateConfig) -> Artifact:
    """Write the corpus to `config.output`.

    Raises:
        InputError: the input is missing or damaged, or nothing is left of it.
    """
    files = list_files(config.inputs)
    documents = score_documents(config, files, config.output.with_name(f"{config.output.name}_documents"), config.workers)
    others = (set(DocumentsConfig.model_fields) - set(CorpusStepsConfig.model_fields)) | {"output", "workers"}
    settings = config.model_dump(mode="json", exclude=others | {"evaluation_sets"})
    settings["weights"] = {source.name: source.weight for source in config.inputs}
    # What the documents were made of stands here too: where other workers wrote them, they are the same documents.
    inputs = documents.manifest.inputs | {"documents": documents.manifest.fingerprint}
    num_files = int(documents.manifest.counts["num_files"])
    return produce(config.output, "corpus", settings, inputs, partial(_make, config, num_files, documents), can_resume=True)


def _make(config: CurateConfig, num_files: int, scored: Artifact, folder: Path) -> dict[str, int]:
    connect(config.workers)
    _keep_files_of(scored, folder)
    documents = scored.path
    index = map_index(_open(documents, list_parts(documents)), folder / _INDEX)
    index = reject_bad_files(index, num_files, config.max_bad_file_share)
    weights = {source.name: source.weight for source in config.inputs}
    verdicts = decide(index, make_corpus_steps(config, folder), config.heldout_share, weights)
    _write_splits(config, verdicts, documents, folder)
    report = make_report(verdicts, _read_texts(verdicts, documents), config.quality)
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.html", render_page(report))
    for name in (_INDEX, _PLAN):
        (folder / name).unlink()
    return _count(report, num_files)


def _keep_files_of(scored: Artifact, folder: Path) -> None:
    """Remove what another version of this program, or a cut out of other documents, has left, and what is half written."""
    plan, path = f"{powerhouse.__version__} {scored.manifest.digest}", folder / _PLAN
    if not path.exists() or path.read_text(encoding="utf-8") != plan:
        for split in SPLITS:
            shutil.rmtree(folder / split, ignore_errors=True)
        write_atomically(path, plan)
    for half in folder.glob("*/.*.tmp"):
        half.unlink()


def map_index(dataset: pads.Dataset, path: Path) -> pa.Table:
    """Write every column but the text to a file, and give it mapped into memory: what no step looks at takes none."""
    columns = [name for name in dataset.schema.names if name != "text"]
    schema = pa.schema([dataset.schema.field(name) for name in columns])
    with pa.ipc.new_file(path, schema) as writer:
        for batch in dataset.to_batches(columns=columns, batch_size=_ROWS_PER_GROUP, batch_readahead=2, fragment_readahead=2):
            writer.write_batch(batch)
    pa.default_memory_pool().release_unused()
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _open(documents: Path, parts: Sequence[Part]) -> pads.Dataset:
    """The parts alone, which have the corpus' order: beside them lies the manifest."""
    return pads.dataset([str(documents / part.name) for part in parts], format="parquet")


def _count(report: dict[str, Any], num_files: int) -> dict[str, int]:
    total = report["total"]
    return {
        "num_files": num_files,
        "num_documents": total["documents"],
        "num_rejects": sum(total["removed"].values()),
        "num_train": total["train"]["documents"],
        "num_heldout": total["heldout"]["documents"],
        "train_chars": total["train"]["chars"],
        "heldout_chars": total["heldout"]["chars"],
    }


def _write_splits(config: CurateConfig, verdicts: Verdicts, documents: Path, folder: Path) -> None:
    """Write each range of the corpus' order as one file of every split that has documents there, if it is not there already."""
    path = folder / "verdicts.parquet"
    decisions = verdicts.index.select(["order", "reason", "detail", "split", "num_copies"])
    pq.write_table(decisions, path, row_group_size=_ROWS_PER_GROUP)
    every = _plan_ranges(verdicts.index, config.num_documents_per_file, list_parts(documents))
    ranges = [row for row in every if not all((folder / name).exists() for name in row["files"])]
    if len(ranges) < len(every):
        fields = {"num_kept": len(every) - len(ranges), "num_ranges": len(every)}
        make_logger("corpora").info("files of an earlier run are kept", extra={"fields": fields})
    write = partial(_write_range, documents=documents, folder=folder, repeated_lines=verdicts.repeated_lines)
    with worker_failures("splits"), progress("files written", len(every), "range", initial=len(every) - len(ranges)) as bar:
        for batch in _in_tasks(write, ranges, config.workers):
            bar.update(batch.num_rows)
    path.unlink()


def _in_tasks(write: Any, ranges: list[dict[str, Any]], workers: WorkersConfig) -> Iterator[pa.Table]:
    if ranges:  # Ray Data knows no type of no rows
        items = ray.data.from_items(ranges, override_num_blocks=len(ranges))
        yield from items.map(write, **workers.options()).iter_batches(batch_size=None, batch_format="pyarrow")


def _plan_ranges(index: pa.Table, num_documents: int, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Give of each range its first and last place in the order, the parts that hold it, and the files that it becomes."""
    orders = index["order"].to_numpy()
    starts = np.arange(0, len(orders), num_documents)
    counts = {split: np.add.reduceat(pc.equal(index["split"], split).to_numpy(), starts, dtype=np.int64) for split in SPLITS}
    ranges = []
    for number, start in enumerate(starts.tolist()):
        first, last = int(orders[start]), int(orders[min(start + num_documents, len(orders)) - 1])
        names = [part.name for part in parts_holding(parts, first, last)]
        files = [f"{split}/part-{number:05d}.parquet" for split in SPLITS if counts[split][number]]
        ranges.append({"first": first, "last": last, "parts": names, "files": files})
    return ranges


def _write_range(row: dict[str, Any], documents: Path, folder: Path, repeated_lines: npt.NDArray[np.uint64]) -> dict[str, int]:
    is_here = (pads.field("order") >= row["first"]) & (pads.field("order") <= row["last"])
    parts = [Part.of(Path(name)) for name in row["parts"]]
    texts = _open(documents, parts).to_table(columns=["order", *_COLUMNS], filter=is_here)
    verdicts = pads.dataset(folder / "verdicts.parquet").to_table(filter=is_here)
    splits = verdicts["split"].to_numpy()
    for name in row["files"]:
        split = name.partition("/")[0]
        rows = np.repeat(np.flatnonzero(splits == split), verdicts["num_copies"].to_numpy()[splits == split])
        part = texts.select(_COLUMNS).take(rows)
        if split != "rejects" and len(repeated_lines):
            kept = [drop_lines(text, repeated_lines) for text in part["text"].to_pylist()]
            part = part.set_column(_COLUMNS.index("text"), "text", pa.array(kept, type=pa.large_string()))
        if split == "rejects":
            for column in ("reason", "detail"):
                part = part.append_column(column, verdicts[column].take(rows))
        (folder / split).mkdir(exist_ok=True)
        with replacing(folder / name) as path:
            pq.write_table(part.combine_chunks(), path, compression="zstd")
    return {"num_files": len(row["files"])}


def _read_texts(verdicts: Verdicts, documents: Path) -> dict[int, str]:
    """Give the text of the rows that the report shows."""
    rows = sampled_rows(verdicts)
    if not rows:
        return {}
    parts = list_parts(documents)
    order_of = {verdicts.index["order"][row].as_py(): row for row in rows}
    holding = {part for order in order_of for part in parts_holding(parts, order, order)}
    table = _open(documents, sorted(holding)).to_table(
        columns=["order", "text"], filter=pads.field("order").isin(list(order_of))
    )
    return {order_of[item["order"]]: item["text"] for item in table.to_pylist()}
