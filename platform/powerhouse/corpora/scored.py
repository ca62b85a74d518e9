"""The first half of a corpus: every document of the input, extracted, anonymised, with its scores. [Ray]

Nothing is left out here for its scores, so that other limits, another duplicate threshold or another split need only the second
half, pipeline.py. The documents lie in an artifact beside the corpus.

Tasks read files, a few or a piece of one, and hand on their documents in parts of about 4 MB; actors score a part and write it.
Parts that are there when a killed stage is run again are not scored again, and tasks of which all parts are there not read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.util.annotations import RayDeprecationWarning

import powerhouse
from powerhouse.artifacts import Artifact, produce, write_atomically
from powerhouse.corpora.parts import Part, count_documents, is_whole, list_parts, parts_between
from powerhouse.corpora.process import DOCUMENTS_PER_FILE, DocumentProcessor, read_files
from powerhouse.corpora.session import TABLES, WorkersConfig, connect, worker_failures
from powerhouse.corpora.sources import InputFile, identify
from powerhouse.corpora.steps import DocumentsConfig, digest_inputs, make_document_steps
from powerhouse.telemetry import make_logger, progress

_BYTES_PER_TASK = 2**21
_MANY_TASKS = 4096
_FILES_PER_TASK = 256
_PLAN = "plan.txt"


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
    return produce(folder, "documents", settings, inputs, partial(_make, config, files, workers), can_resume=True)


def plan_tasks(files: Sequence[InputFile]) -> list[list[InputFile]]:
    """Group files that follow each other to about 2 MB, more in a corpus of over 8 GB; the files alone decide it."""
    task_bytes = max(_BYTES_PER_TASK, sum(file.size_bytes for file in files) // _MANY_TASKS)
    groups: list[list[InputFile]] = []
    num_bytes = 0
    for file in files:
        if not groups or num_bytes + file.size_bytes > task_bytes or len(groups[-1]) == _FILES_PER_TASK:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += file.size_bytes
    return groups


def _make(config: DocumentsConfig, files: list[InputFile], workers: WorkersConfig, folder: Path) -> dict[str, int]:
    tasks = plan_tasks(files)
    _keep_parts_of(tasks, folder)
    kept = list_parts(folder)
    work = [_Work(group, own) for group in tasks if not is_whole(own := _parts_of(group, kept))]
    if work:
        _score(config, work, len(tasks), count_documents(folder, kept), workers, folder)
    num_documents = count_documents(folder, list_parts(folder))
    (folder / _PLAN).unlink()
    return {"num_files": len({(file.source, file.relative) for file in files}), "num_documents": num_documents}


def _keep_parts_of(tasks: list[list[InputFile]], folder: Path) -> None:
    """Remove the parts that another version of this program, which may cut the input otherwise, has left."""
    plan = repr((powerhouse.__version__, tasks))
    path = folder / _PLAN
    if not path.exists() or path.read_text(encoding="utf-8") != plan:
        for part in list_parts(folder):
            (folder / part.name).unlink()
        write_atomically(path, plan)


@dataclass(frozen=True)
class _Work:
    """What is left to do of a task: its files, and the parts of it that are there."""

    files: list[InputFile]
    kept: Sequence[Part]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def row(self) -> dict[str, str]:
        """Give the row of Ray Data that tells it; text, so that all rows have the same type."""
        files = [asdict(file) for file in self.files]
        return {"task": json.dumps({"files": files, "kept": [part.name for part in self.kept]})}


def _parts_of(files: Sequence[InputFile], parts: Sequence[Part]) -> Sequence[Part]:
    return parts_between(parts, files[0].number * DOCUMENTS_PER_FILE, (files[-1].number + 1) * DOCUMENTS_PER_FILE)


def _score(
    config: DocumentsConfig, work: list[_Work], num_tasks: int, num_kept: int, workers: WorkersConfig, folder: Path
) -> None:
    connect(workers)
    # The largest first, so that no worker is left with one at the end.
    work = sorted(work, key=lambda item: -item.size_bytes)
    rows = [item.row() for item in work]
    max_actors = max(len(work), sum(item.size_bytes for item in work) // _BYTES_PER_TASK)
    raw = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _read, fn_args=(config.chunk_chars,), **TABLES, **workers.options()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # 2.60 has no other way to bound the tries of a pool's tasks
        done = raw.map_batches(_Processor, fn_constructor_args=(config, folder), **TABLES, **workers.pool(max_actors))
    num_read, num_done = 0, num_tasks - len(work)
    with progress("documents scored", None, "document", initial=num_kept) as bar, worker_failures("documents"):
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            num_new = pc.sum(batch["num_documents"]).as_py() or 0
            num_read += num_new
            num_done += pc.sum(batch["is_last"]).as_py() or 0
            bar.set_postfix_str(f"{num_done} of {num_tasks} tasks", refresh=False)
            bar.update(num_new)
    if num_kept:
        fields = {"num_kept": num_kept, "num_scored": num_read}
        make_logger("corpora").info("documents of an earlier run are kept", extra={"fields": fields})


def _read(batch: pa.Table, chunk_chars: int) -> Iterator[pa.Table]:
    """Give a row for each part of a task that is not there yet: the place of the part, and its raw documents."""
    for text in batch["task"].to_pylist():
        task = json.loads(text)
        files = [InputFile(**file) for file in task["files"]]
        # A task that Ray runs again has to give the same rows: what has been written since must not count.
        kept = set(task["kept"])
        first = files[0].number * DOCUMENTS_PER_FILE
        for number, (raw, after) in enumerate(pairwise(chain(read_files(files, chunk_chars), [None]))):
            assert raw is not None, "only the end is none"
            part = Part(raw["order"][0].as_py() if raw.num_rows else first, number, is_last=after is None)
            if part.name not in kept:
                yield pa.table({"part": [part.name], "documents": pa.array([_pack(raw)], type=pa.large_binary())})


def _pack(table: pa.Table) -> bytes:
    """One row for a whole part: Ray Data joins and cuts tables of many rows as it likes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class _Processor:
    """The actor: it writes the documents of a part with their scores, and answers how many there are."""

    def __init__(self, config: DocumentsConfig, folder: Path) -> None:
        self._process = DocumentProcessor(make_document_steps(config), config.extract_timeout_s)
        self._folder = folder

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        for name, packed in zip(parts["part"], parts["documents"], strict=True):
            part = Part.of(Path(name.as_py()))
            documents = self._process(pa.ipc.open_stream(packed.as_buffer()).read_all())
            part.write(self._folder, documents)
            yield pa.table({"num_documents": [documents.num_rows], "is_last": [part.is_last]})
