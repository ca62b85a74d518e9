"""From a corpus to packed token rows, by a tokenizer learnt from it or by that of a model. [Ray]

Each parquet file of the corpus is one task, which writes its part of the token stream under work/. The driver packs by the
lengths of the documents alone, maps the whole stream into memory and gathers the shuffled rows shard by shard, so that it never
holds more than one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pydantic import Field, model_validator
from ray.data import ActorPoolStrategy

from powerhouse.artifacts import Artifact, produce, write_atomically
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.encoder import make_encoder
from powerhouse.corpora.pack import Indices, Tokens, documents_of_pieces, join, pack, shuffle_order
from powerhouse.corpora.rows import write_provenance, write_rows
from powerhouse.corpora.session import TABLES, WorkersConfig, connect
from powerhouse.corpora.vocabulary import Method, train
from powerhouse.errors import InputError
from powerhouse.telemetry import progress
from powerhouse.tokenizer import Tokenizer

_DOCUMENTS_PER_BATCH = 256


class TokensConfig(Config):
    """Settings of jobs/train_tokenizer.py."""

    corpus: StoragePath
    """Folder of the corpus; its train/ documents are used."""
    output: StoragePath
    """Folder of the tokens: tokenizer.json, rows/*.arrow, provenance.parquet, report.json."""
    tokenizer: StoragePath | None = None
    """A model directory whose tokenizer is taken as it is, to train that model on; null learns one from the corpus."""
    method: Method = "bpe"
    """How the vocabulary is learnt and text is cut by it: bpe or unigram."""
    vocab_size: int = Field(default=4096, gt=257)
    """Tokens of the vocabulary: 256 bytes, the end of a text, and the pieces learnt."""
    row_length: int = Field(default=257, ge=2)
    """Tokens in a row: the training context and one more for the last label."""
    rows_per_shard: int = Field(default=65_536, ge=1)
    """Rows in one file."""
    seed: int = Field(default=0, ge=0)
    """Of the shuffle of the rows."""
    workers: WorkersConfig = WorkersConfig()
    """How much of the cluster to take."""

    @model_validator(mode="after")
    def _learns_or_takes(self) -> TokensConfig:
        if self.tokenizer and (both := self.model_fields_set & _LEARNING):
            raise ValueError(f"either `tokenizer`, a model's own, or {' and '.join(sorted(both))}, to learn one")
        return self


_LEARNING = {"method", "vocab_size"}
"""Settings of a tokenizer that is learnt."""


def make_tokens(config: TokensConfig) -> Artifact:
    """Write tokenizer and token rows to `config.output`.

    Raises:
        ArtifactError: the corpus is missing or unfinished.
        InputError: the text cannot give such a vocabulary, or fills no row.
        ModelFormatError: the tokenizer is missing or damaged, or has no token that ends a text.
    """
    inputs: dict[str, Artifact | str] = {"corpus": Artifact.open(config.corpus, "corpus")}
    others = {"corpus", "output", "workers", "tokenizer"}
    if config.tokenizer:
        inputs["tokenizer"] = Tokenizer.load(config.tokenizer).digest
        others |= _LEARNING
    settings = config.model_dump(mode="json", exclude=others)
    return produce(config.output, "tokens", settings, inputs, partial(_make, config))


def _make(config: TokensConfig, folder: Path) -> dict[str, int | float]:
    paths = sorted((config.corpus / "train").glob("*.parquet"))
    tokenizer = _get_tokenizer(config, paths, folder)
    connect(config.workers)
    documents = _encode(config.workers, paths, folder)
    num_tokens = pc.sum(documents["num_tokens"], min_count=0).as_py()
    if num_tokens < config.row_length:
        raise InputError(
            "the corpus fills no row", got=f"{num_tokens} tokens, row_length={config.row_length}", do="lower row_length"
        )
    pieces = pack(documents["num_tokens"].to_numpy(), config.row_length)
    stream_T = _join_parts(folder / "work", len(paths))
    order_N = shuffle_order(pieces.num_rows, config.seed)
    write_rows(folder / "rows", stream_T, pieces, order_N, config.rows_per_shard)
    del stream_T  # unmaps the file
    shutil.rmtree(folder / "work")
    documents_P = documents_of_pieces(documents["num_tokens"].to_numpy(), pieces)
    write_provenance(folder / "provenance.parquet", documents["doc_id"].to_numpy()[documents_P], pieces, order_N)
    report = make_report(documents, documents_P, config.row_length, num_marks=len(tokenizer.start_of_text_ids) + 1)
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    shape: dict[str, int | float] = {
        "num_rows": pieces.num_rows,
        "row_length": config.row_length,
        "vocab_size": tokenizer.vocab_size,
    }
    return {**shape, **report["total"]}


def _get_tokenizer(config: TokensConfig, paths: list[Path], folder: Path) -> Tokenizer:
    """Take the model's or learn one, and write it to the folder."""
    if config.tokenizer is None:
        return train(config.method, _read_texts(paths), config.vocab_size, folder)
    tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.save(folder)
    return tokenizer


def make_report(documents: pa.Table, documents_P: Indices, row_length: int, num_marks: int = 1) -> dict[str, Any]:
    """Count documents, tokens and bytes of each source and of all.

    `documents_P` are the documents of the pieces; `num_marks` tokens of each document start or end it.
    """
    num_pieces_D = np.bincount(documents_P, minlength=documents.num_rows)
    num_rows_needed_D = -(-documents["num_tokens"].to_numpy() // row_length)
    documents = documents.append_column("is_cut", pa.array(num_pieces_D > num_rows_needed_D))
    names = pc.unique(documents["source"]).to_pylist()
    sources = {name: _count(documents.filter(pc.equal(documents["source"], name)), num_marks) for name in names}
    return {"sources": sources, "total": _count(documents, num_marks)}


def _count(documents: pa.Table, num_marks: int) -> dict[str, int | float]:
    num_bytes, num_tokens, num_words = (pc.sum(documents[name]).as_py() for name in ("num_bytes", "num_tokens", "num_words"))
    num_text_tokens = max(1, num_tokens - num_marks * documents.num_rows)  # marks are no bytes and no words
    return {
        "num_documents": documents.num_rows,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_words": num_words,
        "bytes_per_token": round(num_bytes / num_text_tokens, 4),
        "tokens_per_word": round(num_text_tokens / max(1, num_words), 4),
        "num_documents_cut": pc.sum(documents["is_cut"]).as_py(),
    }


def _read_texts(paths: list[Path]) -> Iterator[str]:
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    with progress("documents to the tokenizer", num_rows, "document") as bar:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(_DOCUMENTS_PER_BATCH, columns=["text"]):
                yield from batch["text"].to_pylist()
                bar.update(len(batch))


def _encode(workers: WorkersConfig, paths: list[Path], folder: Path) -> pa.Table:
    """Write the stream of each file of the corpus; give id, source and counts of every document, in order."""
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
        self._encode = make_encoder(self._tokenizer)

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        for file in files.to_pylist():
            yield self._encode_file(file["number"], Path(file["path"]))

    def _encode_file(self, number: int, path: Path) -> pa.Table:
        table = pq.read_table(path, columns=["doc_id", "source", "text"])
        texts = table["text"].to_pylist()
        start = self._tokenizer.start_of_text_ids
        documents = [[*start, *ids] for ids in self._encode(texts)] if start else self._encode(texts)
        stream_T, lengths_D = join(documents, self._tokenizer.end_of_text_id)
        stream_T.tofile(_part_path(self._folder / "work", number))
        return pa.table(
            {
                "number": np.full(len(texts), number),
                "place": np.arange(len(texts)),
                "doc_id": table["doc_id"],
                "source": table["source"],
                "num_tokens": lengths_D,
                "num_bytes": [len(text.encode()) for text in texts],
                "num_words": [len(text.split()) for text in texts],
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
