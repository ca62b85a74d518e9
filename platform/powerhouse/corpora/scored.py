"""The first half of a corpus: every document of the input, extracted, anonymised, with its scores. [Ray]

Nothing is left out here for its scores, so that other limits, another duplicate threshold or another split need only the second
half, pipeline.py. The documents lie in an artifact beside the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy

from powerhouse.artifacts import Artifact, produce
from powerhouse.corpora.process import DOCUMENTS_PER_FILE, DocumentProcessor, read_files
from powerhouse.corpora.session import TABLES, WorkersConfig, connect
from powerhouse.corpora.sources import InputFile, identify
from powerhouse.corpora.steps import DocumentsConfig, digest_inputs, make_document_steps
from powerhouse.telemetry import progress

_BYTES_PER_TASK = 2**21
_FILES_PER_TASK = 256


def score_documents(config: DocumentsConfig, files: list[InputFile], folder: Path, workers: WorkersConfig) -> Artifact:
    """Write the documents to the folder, if they are not there: parquet files in any order, with the column `order`.

    Raises:
        InputError: a file beside the text, such as an evaluation set, is missing.
    """
    identities = {source.name: identify(source) for source in config.inputs}
    places: Any = {
        "inputs": {"__all__": {"path", "weight"}},
        "evaluation_sets": {"__all__": {"path"}},
        "pseudonym_key_file": True,
    }
    settings = config.model_dump(mode="json", include=set(DocumentsConfig.model_fields), exclude=places)
    settings["folders"] = {name: below for name, (below, _) in identities.items()}
    inputs = {name: content for name, (_, content) in identities.items()} | digest_inputs(config)
    return produce(folder, "documents", settings, inputs, partial(_make, config, files, workers))


def plan_tasks(files: Sequence[InputFile]) -> list[list[InputFile]]:
    """Group files that follow each other to about 2 MB, the largest group first; the files alone decide it."""
    groups: list[list[InputFile]] = []
    num_bytes = 0
    for file in files:
        if not groups or num_bytes + file.size_bytes > _BYTES_PER_TASK or len(groups[-1]) == _FILES_PER_TASK:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += file.size_bytes
    return sorted(groups, key=lambda group: -sum(file.size_bytes for file in group))


def _make(config: DocumentsConfig, files: list[InputFile], workers: WorkersConfig, folder: Path) -> dict[str, int]:
    connect(workers)
    tasks = plan_tasks(files)
    done = (
        ray.data.from_items([{"task": number} for number in range(len(tasks))], override_num_blocks=len(tasks))
        .map_batches(_read, fn_args=(tasks, config.chunk_chars), **TABLES, **workers.options())
        .map_batches(
            _Processor,
            fn_constructor_args=(config, folder),
            compute=ActorPoolStrategy(size=min(workers.num, len(tasks))),
            **TABLES,
            **workers.options(),
        )
    )
    seen: set[int] = set()
    num_documents = 0
    with progress("documents scored", None, "document") as bar:
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            seen.update(batch["number"].to_pylist())
            num_documents += (num_new := pc.sum(batch["num_documents"]).as_py() or 0)
            bar.set_postfix_str(f"{len(seen)} of {len(files)} files", refresh=False)
            bar.update(num_new)
    return {"num_files": len(files), "num_documents": num_documents}


def _read(batch: pa.Table, tasks: list[list[InputFile]], chunk_chars: int) -> Iterator[pa.Table]:
    for number in batch["task"].to_pylist():
        yield from read_files(tasks[number], chunk_chars)


class _Processor:
    """The actor: it writes the documents that it scored, and answers only how many there are of which files."""

    def __init__(self, config: DocumentsConfig, folder: Path) -> None:
        self._process = DocumentProcessor(make_document_steps(config))
        self._folder = folder

    def __call__(self, raw: pa.Table) -> pa.Table:
        if raw.num_rows:
            # The first place names the file, so that a task that Ray runs again writes over what it left.
            path = self._folder / f"{raw['order'][0].as_py():016x}.parquet"
            pq.write_table(self._process(raw), path, compression="zstd")
        counts = pc.value_counts(pc.divide(raw["order"], DOCUMENTS_PER_FILE))
        return pa.table({"number": counts.field("values"), "num_documents": counts.field("counts")})
