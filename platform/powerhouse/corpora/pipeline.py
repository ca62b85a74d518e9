"""From folders of books, web pages and Wikipedia dumps to a clean corpus. [Ray]

    read ─> extract ─> anonymise ─> score ─> sign ─> │ ─> quality ─> duplicates ─> split ─> write
    └───────── scored.py: actors and tasks ────────┘        └────── driver ──────┘         tasks

Every document has a place in one order of the whole corpus, which the names of the input files alone decide. So neither the
number of workers nor the order in which they finish changes a byte of the result. Text is never shuffled and never on the
driver, which holds an index of the scores, with a signature of 448 bytes for each document.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray.data
from pydantic import Field

from powerhouse.artifacts import Artifact, produce, write_atomically
from powerhouse.config import StoragePath
from powerhouse.corpora.page import render_page
from powerhouse.corpora.repeats import drop_lines
from powerhouse.corpora.report import make_report, sampled_rows
from powerhouse.corpora.scored import score_documents
from powerhouse.corpora.session import WorkersConfig, connect
from powerhouse.corpora.sources import list_files
from powerhouse.corpora.steps import CorpusStepsConfig, DocumentsConfig, make_corpus_steps
from powerhouse.corpora.verdict import Verdicts, decide, reject_bad_files

_COLUMNS = ["doc_id", "source", "kind", "path", "offset", "text"]


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
    return produce(config.output, "corpus", settings, inputs, partial(_make, config, len(files), documents.path))


def _make(config: CurateConfig, num_files: int, documents: Path, folder: Path) -> dict[str, int]:
    connect(config.workers)
    dataset = _open(documents)
    index = dataset.to_table(columns=[name for name in dataset.schema.names if name != "text"]).sort_by("order")
    index = reject_bad_files(index, num_files, config.max_bad_file_share)
    weights = {source.name: source.weight for source in config.inputs}
    verdicts = decide(index, make_corpus_steps(config), config.heldout_share, weights)
    _write_splits(config, verdicts, documents, folder)
    report = make_report(verdicts, _read_texts(verdicts, documents), config.quality)
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.html", render_page(report))
    return _count(report, num_files)


def _open(documents: Path) -> pads.Dataset:
    """The parquet files alone: beside them lies the manifest."""
    return pads.dataset(sorted(map(str, documents.glob("*.parquet"))), format="parquet")


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
    """Write each range of the corpus' order as one file of every split that has documents there."""
    path = folder / "verdicts.parquet"
    pq.write_table(verdicts.index.select(["order", "reason", "detail", "split", "num_copies"]), path)
    orders = verdicts.index["order"].to_numpy()
    step = config.num_documents_per_file
    ranges = [
        {"number": number, "first": int(part[0]), "last": int(part[-1])}
        for number, part in enumerate(np.split(orders, range(step, len(orders), step)))
    ]
    items = ray.data.from_items(ranges, override_num_blocks=len(ranges))
    write = partial(_write_range, documents=documents, folder=folder, repeated_lines=verdicts.repeated_lines)
    items.map(write, **config.workers.options()).materialize()
    path.unlink()


def _write_range(row: dict[str, Any], documents: Path, folder: Path, repeated_lines: npt.NDArray[np.uint64]) -> dict[str, Any]:
    is_here = (pads.field("order") >= row["first"]) & (pads.field("order") <= row["last"])
    dataset = _open(documents)
    texts = dataset.to_table(columns=["order", *_COLUMNS], filter=is_here).sort_by("order")
    verdicts = pads.dataset(folder / "verdicts.parquet").to_table(filter=is_here).sort_by("order")
    splits = verdicts["split"].to_numpy()
    for split in ("train", "heldout", "rejects"):
        rows = np.repeat(np.flatnonzero(splits == split), verdicts["num_copies"].to_numpy()[splits == split])
        part = texts.select(_COLUMNS).take(rows)
        if split != "rejects" and len(repeated_lines):
            kept = [drop_lines(text, repeated_lines) for text in part["text"].to_pylist()]
            part = part.set_column(_COLUMNS.index("text"), "text", pa.array(kept, type=pa.large_string()))
        if split == "rejects":
            for name in ("reason", "detail"):
                part = part.append_column(name, verdicts[name].take(rows))
        if part.num_rows:
            (folder / split).mkdir(exist_ok=True)
            pq.write_table(part.combine_chunks(), folder / split / f"part-{row['number']:05d}.parquet", compression="zstd")
    return row


def _read_texts(verdicts: Verdicts, documents: Path) -> dict[int, str]:
    """Give the text of the rows that the report shows."""
    rows = sampled_rows(verdicts)
    order_of = {verdicts.index["order"][row].as_py(): row for row in rows}
    table = _open(documents).to_table(columns=["order", "text"], filter=pads.field("order").isin(list(order_of)))
    return {order_of[item["order"]]: item["text"] for item in table.to_pylist()}
