"""From a corpus to a tokenizer and packed token rows. [Ray]

Each parquet file of the corpus is one task, which writes its part of the token stream under work/; the driver then maps the
whole stream into memory and gathers the shuffled rows shard by shard, so that it never holds more than one shard.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pydantic import Field
from ray.data import ActorPoolStrategy

from powerhouse.artifacts import Artifact, produce
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.pack import Indices, Tokens, cut, documents_of_rows, join, shuffle_order
from powerhouse.corpora.session import TABLES, WorkersConfig, connect
from powerhouse.corpora.shards import write_shard
from powerhouse.errors import InputError
from powerhouse.telemetry import progress
from powerhouse.tokenizer import Tokenizer

_DOCUMENTS_PER_BATCH = 256


class TokensConfig(Config):
    """Settings of jobs/train_tokenizer.py."""

    corpus: StoragePath
    """Folder of the corpus; its train/ documents are used."""
    output: StoragePath
    """Folder of the tokens: tokenizer.json, rows/*.arrow, provenance.parquet."""
    vocab_size: int = Field(default=4096, gt=257)
    """Tokens of the vocabulary: 256 bytes, the end of a text, and the merges learnt."""
    row_length: int = Field(default=257, ge=2)
    """Tokens in a row: the training context and one more for the last label."""
    rows_per_shard: int = Field(default=65_536, ge=1)
    """Rows in one file."""
    seed: int = Field(default=0, ge=0)
    """Of the shuffle of the rows."""
    workers: WorkersConfig = WorkersConfig()
    """How much of the cluster to take."""


def make_tokens(config: TokensConfig) -> Artifact:
    """Write tokenizer and token rows to `config.output`.

    Raises:
        ArtifactError: the corpus is missing or unfinished.
        InputError: the text cannot give such a vocabulary, or fills no row.
    """
    corpus = Artifact.open(config.corpus, "corpus")
    settings = config.model_dump(mode="json", exclude={"corpus", "output", "workers"})
    return produce(config.output, "tokens", settings, {"corpus": corpus}, partial(_make, config))


def _make(config: TokensConfig, folder: Path) -> dict[str, int | float]:
    paths = sorted((config.corpus / "train").glob("*.parquet"))
    tokenizer = Tokenizer.train(_read_texts(paths), config.vocab_size)
    tokenizer.save(folder)
    connect(config.workers)
    documents = _encode(config.workers, paths, folder)
    stream_T = _join_parts(folder / "work", len(paths))
    rows_NR = cut(stream_T, config.row_length)
    if not len(rows_NR):
        raise InputError(
            "the corpus fills no row", got=f"{len(stream_T)} tokens, row_length={config.row_length}", do="lower row_length"
        )
    order_N = shuffle_order(len(rows_NR), config.seed)
    _write_shards(rows_NR, order_N, config.rows_per_shard, folder / "rows")
    _write_provenance(documents, order_N, config.row_length, folder / "provenance.parquet")
    counts = _count(documents, rows_NR, tokenizer)
    del stream_T, rows_NR  # unmaps the file
    shutil.rmtree(folder / "work")
    return counts


def _count(documents: pa.Table, rows_NR: Tokens, tokenizer: Tokenizer) -> dict[str, int | float]:
    num_bytes, num_tokens = (int(documents[name].to_numpy().sum()) for name in ("num_bytes", "num_tokens"))
    return {
        "num_rows": len(rows_NR),
        "row_length": rows_NR.shape[1],
        "vocab_size": tokenizer.vocab_size,
        "num_documents": documents.num_rows,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        # The ends of the texts are no bytes of theirs.
        "bytes_per_token": round(num_bytes / max(1, num_tokens - documents.num_rows), 4),
    }


def _read_texts(paths: list[Path]) -> Iterator[str]:
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    with progress("documents to the tokenizer", num_rows, "document") as bar:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(_DOCUMENTS_PER_BATCH, columns=["text"]):
                yield from batch["text"].to_pylist()
                bar.update(len(batch))


def _encode(workers: WorkersConfig, paths: list[Path], folder: Path) -> pa.Table:
    """Write the stream of each file of the corpus; give doc_id, num_tokens and num_bytes of every document, in order."""
    (folder / "work").mkdir()
    items = [{"number": number, "path": str(path)} for number, path in enumerate(paths)]
    encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Encoder,
        fn_constructor_args=(folder,),
        compute=ActorPoolStrategy(size=min(workers.num, len(paths))),
        **TABLES,
        **workers.options(),
    )
    parts = []
    with progress("files encoded", len(paths), "file") as bar:
        for part in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            parts.append(part)
            bar.update(len(part["number"].unique()))
    return pa.concat_tables(parts).sort_by([("number", "ascending"), ("place", "ascending")])


class _Encoder:
    """The actor: it encodes one file of the corpus at a time."""

    def __init__(self, folder: Path) -> None:
        os.environ["RAYON_NUM_THREADS"] = "1"  # the workers are the parallelism
        self._folder = folder
        self._tokenizer = Tokenizer.load(folder)

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        for file in files.to_pylist():
            yield self._encode_file(file["number"], Path(file["path"]))

    def _encode_file(self, number: int, path: Path) -> pa.Table:
        table = pq.read_table(path, columns=["doc_id", "text"])
        texts = table["text"].to_pylist()
        stream_T, lengths_D = join(self._tokenizer.encode_batch(texts), self._tokenizer.end_of_text_id)
        stream_T.tofile(_part_path(self._folder / "work", number))
        return pa.table(
            {
                "number": np.full(len(texts), number),
                "place": np.arange(len(texts)),
                "doc_id": table["doc_id"],
                "num_tokens": lengths_D,
                "num_bytes": [len(text.encode()) for text in texts],
            }
        )


def _part_path(work: Path, number: int) -> Path:
    return work / f"part-{number:05d}.bin"


def _join_parts(work: Path, num_parts: int) -> Tokens:
    """Put the parts into one file and map it."""
    with (work / "stream.bin").open("wb") as stream:
        for number in range(num_parts):
            with _part_path(work, number).open("rb") as part:
                shutil.copyfileobj(part, stream)
    return np.memmap(work / "stream.bin", dtype=np.int32, mode="r")


def _write_shards(rows_NR: Tokens, order_N: Indices, rows_per_shard: int, folder: Path) -> None:
    folder.mkdir()
    for number, start in enumerate(range(0, len(order_N), rows_per_shard)):
        write_shard(folder / f"rows-{number:05d}.arrow", rows_NR[order_N[start : start + rows_per_shard]])


def _write_provenance(documents: pa.Table, order_N: Indices, row_length: int, path: Path) -> None:
    """Write, for each row of the shards, the ids of the documents that its tokens come from."""
    first_N, last_N = documents_of_rows(documents["num_tokens"].to_numpy(), len(order_N), row_length)
    doc_ids_D = documents["doc_id"].to_numpy()
    ids = [doc_ids_D[first_N[row] : last_N[row] + 1] for row in order_N]
    pq.write_table(pa.table({"doc_ids": pa.array(ids, type=pa.list_(pa.uint64()))}), path)
