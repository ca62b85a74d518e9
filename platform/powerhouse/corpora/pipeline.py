"""From folders of books, web pages and Wikipedia dumps to a clean corpus. [Ray]

    read ─> extract ─> anonymise ─> quality ─> language ─> sign ─> duplicates ─> split ─> write
    └──────────────────── an actor for each worker ───────────┘    └──── driver ─────┘    tasks

Every document has a place in one order of the whole corpus, which the names of the input files alone decide. So neither the
number of workers nor the order in which they finish changes a byte of the result. Text is never shuffled and never on the
driver: it lies under work/ until the verdicts are known. The driver holds an index, with a signature
of 448 bytes for each document.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray.data
from pydantic import Field
from ray.data import ActorPoolStrategy

from powerhouse.artifacts import Artifact, produce, write_atomically
from powerhouse.config import StoragePath
from powerhouse.corpora.process import DOCUMENTS_PER_FILE, DocumentProcessor, read_files
from powerhouse.corpora.report import make_report, sampled_rows
from powerhouse.corpora.session import TABLES, WorkersConfig, connect
from powerhouse.corpora.sources import InputFile, identify, list_files
from powerhouse.corpora.steps import CorpusStepsConfig, DocumentsConfig, digest_inputs, make_corpus_steps, make_document_steps
from powerhouse.corpora.verdict import Verdicts, decide, reject_bad_files
from powerhouse.telemetry import progress

_TASKS_PER_WORKER = 32
_COLUMNS = ["doc_id", "source", "kind", "path", "offset", "text"]


class CurateConfig(DocumentsConfig, CorpusStepsConfig):
    """Settings of jobs/curate_corpus.py."""

    output: StoragePath
    """Folder of the corpus: train/, heldout/ and rejects/ as parquet, report.json."""
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
    identities = {source.name: identify(source) for source in config.inputs}
    places: Any = {"inputs": {"__all__": {"path"}}, "evaluation_sets": {"__all__": {"path"}}, "pseudonym_key_file": True}
    settings = config.model_dump(mode="json", exclude={"output": True, "workers": True, **places})
    settings["folders"] = {name: folder for name, (folder, _) in identities.items()}
    inputs = {name: content for name, (_, content) in identities.items()} | digest_inputs(config)
    return produce(config.output, "corpus", settings, inputs, partial(_make, config, files))


def _make(config: CurateConfig, files: list[InputFile], folder: Path) -> dict[str, int]:
    connect(config.workers)
    work = folder / "work"
    documents = work / "documents"
    _judge_documents(config, files, documents)
    dataset = pads.dataset(documents)
    columns = [name for name in dataset.schema.names if name != "text"]
    index = dataset.to_table(columns=columns).sort_by("order")
    index = reject_bad_files(index, len(files), config.max_bad_file_share)
    verdicts = decide(index, make_corpus_steps(config), config.heldout_share)
    _write_splits(config, verdicts.index, folder, work)
    report = make_report(verdicts, _read_texts(verdicts, documents))
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(work)
    return _count(report, len(files))


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


def _judge_documents(config: CurateConfig, files: list[InputFile], documents: Path) -> None:
    """Write every document with its verdict so far to the folder, in any order, and show how many files are done."""
    documents.mkdir(parents=True)
    workers = config.workers
    largest_first = sorted(files, key=lambda file: -file.path.stat().st_size)
    num_tasks = min(len(files), workers.num * _TASKS_PER_WORKER)
    done = (
        ray.data.from_items([{"number": file.number} for file in largest_first], override_num_blocks=num_tasks)
        .map_batches(_read, fn_args=(files, config.chunk_chars), **TABLES, **workers.options())
        .map_batches(
            _Processor,
            fn_constructor_args=(config, documents),
            compute=ActorPoolStrategy(size=workers.num),
            **TABLES,
            **workers.options(),
        )
    )
    seen: set[int] = set()
    with progress("files judged", len(files), "file") as bar:
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            seen.update(batch["number"].to_pylist())
            bar.update(len(seen) - bar.n)


def _read(batch: pa.Table, files: list[InputFile], chunk_chars: int) -> Iterator[pa.Table]:
    yield from read_files([files[number] for number in batch["number"].to_pylist()], chunk_chars)


class _Processor:
    """The actor: it writes the documents that it judged, and answers only the numbers of their files."""

    def __init__(self, config: CurateConfig, documents: Path) -> None:
        self._process = DocumentProcessor(make_document_steps(config))
        self._documents = documents

    def __call__(self, raw: pa.Table) -> pa.Table:
        if raw.num_rows:
            # The first place names the file, so that a task that Ray runs again writes over what it left.
            pq.write_table(self._process(raw), self._documents / f"{raw['order'][0]}.parquet")
        return pa.table({"number": pc.unique(pc.divide(raw["order"], DOCUMENTS_PER_FILE))})


def _write_splits(config: CurateConfig, index: pa.Table, folder: Path, work: Path) -> None:
    """Write each range of the corpus' order as one file of every split that has documents there."""
    pq.write_table(index.select(["order", "reason", "detail", "split"]), work / "verdicts.parquet")
    orders = index["order"].to_numpy()
    step = config.num_documents_per_file
    ranges = [
        {"number": number, "first": int(part[0]), "last": int(part[-1])}
        for number, part in enumerate(np.split(orders, range(step, len(orders), step)))
    ]
    items = ray.data.from_items(ranges, override_num_blocks=len(ranges))
    write = partial(_write_range, folder=folder)
    items.map(write, **config.workers.options()).materialize()


def _write_range(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    is_here = (pads.field("order") >= row["first"]) & (pads.field("order") <= row["last"])
    texts = pads.dataset(folder / "work" / "documents").to_table(columns=["order", *_COLUMNS], filter=is_here).sort_by("order")
    verdicts = pads.dataset(folder / "work" / "verdicts.parquet").to_table(filter=is_here).sort_by("order")
    for split in ("train", "heldout", "rejects"):
        is_in = pc.equal(verdicts["split"], split)
        part = texts.filter(is_in).select(_COLUMNS)
        if split == "rejects":
            for name in ("reason", "detail"):
                part = part.append_column(name, verdicts.filter(is_in)[name])
        if part.num_rows:
            (folder / split).mkdir(exist_ok=True)
            pq.write_table(part.combine_chunks(), folder / split / f"part-{row['number']:05d}.parquet", compression="zstd")
    return row


def _read_texts(verdicts: Verdicts, documents: Path) -> dict[int, str]:
    """Give the text of the rows that the report shows."""
    rows = sampled_rows(verdicts)
    order_of = {verdicts.index["order"][row].as_py(): row for row in rows}
    table = pads.dataset(documents).to_table(columns=["order", "text"], filter=pads.field("order").isin(list(order_of)))
    return {order_of[item["order"]]: item["text"] for item in table.to_pylist()}
