"""Evaluation as a job: Ray Data actors hold the model and score the held-out documents. [Ray]"""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from pydantic import Field
from ray.exceptions import RayError

import powerhouse
from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.shards import TokenRows
from powerhouse.device import DeviceName, DtypeName, choose_device, to_dtype
from powerhouse.errors import ClusterError
from powerhouse.evaluation.perplexity import finalise_bits_per_byte, nats_of_documents, unigram_nats, xz_bits_per_byte
from powerhouse.evaluation.score import Score, make_score, make_signature
from powerhouse.heldout import HELDOUT, read_heldout
from powerhouse.models.hub import load_decoder, read_config
from powerhouse.session import connect
from powerhouse.telemetry import progress
from powerhouse.tokenizer import FILE as TOKENIZER_FILE
from powerhouse.tokenizer import Tokenizer

SCORES = "scores.json"


class EvaluationConfig(Config):
    """Score a model on the held-out documents of a corpus, beside what costs nothing to train."""

    model: StoragePath
    """Model directory: ours, or any Hugging Face directory of a supported architecture."""
    corpus: StoragePath
    """Corpus artifact; its held-out documents are scored."""
    tokens: StoragePath
    """Tokens artifact whose training rows give the unigram baseline."""
    output: StoragePath
    """Where scores.json goes."""
    precision: DtypeName = "float32"
    """Type of the computation."""
    device: DeviceName = "auto"
    """Where each actor computes."""
    batch_windows: int = Field(default=16, gt=0)
    """Windows of the model's context in one forward pass."""
    num_actors: int = Field(default=1, gt=0)
    """Processes that hold a copy of the model."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs asked of Ray for an actor; also its number of torch threads, at least one."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs asked of Ray for an actor."""


def evaluate_model(config: EvaluationConfig) -> Artifact:
    """Write scores.json: bits per byte of the model, of token frequencies and of `xz -9` on the same text.

    Raises:
        InputError: the model directory is damaged, or there is no held-out document.
    """
    read_config(config.model)
    inputs = {
        "model": artifacts.identify(config.model, "model"),
        "corpus": Artifact.open(config.corpus, "corpus"),
        "tokens": Artifact.open(config.tokens, "tokens"),
    }
    settings = {"precision": config.precision}
    return artifacts.produce(config.output, "evaluation", settings, inputs, partial(_make, config=config))


def _make(folder: Path, config: EvaluationConfig) -> Counts:
    texts = read_heldout(config.corpus / HELDOUT)
    num_bytes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    scores = {
        "bits_per_byte": _score_model(config, texts, num_bytes),
        "unigram_bits_per_byte": _score_unigram(config, texts, num_bytes),
        "xz_bits_per_byte": _score_xz(texts),
    }
    plain = {name: score.model_dump(mode="json") for name, score in scores.items()}
    artifacts.write_atomically(folder / SCORES, json.dumps(plain, indent=2) + "\n")
    sizes = {"documents": len(texts), "bytes": int(num_bytes.sum())}
    return sizes | {name: round(score.value, 4) for name, score in scores.items()}


def _score_model(config: EvaluationConfig, texts: list[str], num_bytes: npt.NDArray[np.float64]) -> Score:
    nats = _nats_by_ray(config, texts)
    facts = make_signature(
        metric="bits_per_byte",
        tokenizer=_short_hash(config.model / TOKENIZER_FILE),
        context=read_config(config.model).max_position_embeddings,
        windows="disjoint",
        start="end_of_text",
        precision=config.precision,
        version=powerhouse.__version__,
    )
    return make_score(np.stack([nats, num_bytes], axis=1), finalise_bits_per_byte, facts)


def _nats_by_ray(config: EvaluationConfig, texts: list[str]) -> npt.NDArray[np.float64]:
    """Nats of each text, in the texts' order; long and short documents alike go to whichever actor is free."""
    connect("data")
    table = pa.table({"number": range(len(texts)), "text": texts})
    num_rows = math.ceil(len(texts) / (4 * config.num_actors))  # of a block: small enough that no actor waits long for the last
    scored = ray.data.from_arrow([table.slice(start, num_rows) for start in range(0, len(texts), num_rows)]).map_batches(
        ModelScorer,
        fn_constructor_args=(config,),
        batch_size=None,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        resources={"data": 0.001},
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
    )
    nats = np.zeros(len(texts))
    try:
        with progress("scoring", len(texts), "document") as bar:
            for row in scored.iter_rows():
                nats[row["number"]] = row["nats"]
                bar.update()
    except RayError as error:
        raise ClusterError("the held-out documents could not be scored", got=error, do="see the actors' log") from error
    return nats


class ModelScorer:
    """A Ray Data actor: documents in, nats out."""

    def __init__(self, config: EvaluationConfig) -> None:
        device = choose_device(config.device)
        if device.type == "cpu":
            torch.set_num_threads(max(int(config.cpus_per_actor), 1))
        self.model = load_decoder(config.model, dtype=to_dtype(config.precision), device=device)
        self.tokenizer = Tokenizer.load(config.model)
        self.batch_windows = config.batch_windows

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        documents = self.tokenizer.encode_batch(batch["text"].tolist())
        nats = nats_of_documents(self.model, documents, self.tokenizer.end_of_text_id, self.batch_windows)
        return {"number": batch["number"], "nats": np.array(nats)}


def _score_unigram(config: EvaluationConfig, texts: list[str], num_bytes: npt.NDArray[np.float64]) -> Score:
    tokenizer = Tokenizer.load(config.tokens)
    rows = TokenRows(config.tokens / "rows")
    counts_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(rows), 1024):
        counts_V += np.bincount(rows.take(np.arange(start, min(start + 1024, len(rows)))).reshape(-1), minlength=len(counts_V))
    costs_V = unigram_nats(counts_V)
    nats = np.array([costs_V[ids].sum() for ids in tokenizer.encode_batch(texts)])
    tokenizer_hash = _short_hash(config.tokens / TOKENIZER_FILE)
    facts = make_signature(metric="bits_per_byte", model="unigram,add-one", tokenizer=tokenizer_hash)
    return make_score(np.stack([nats, num_bytes], axis=1), finalise_bits_per_byte, facts)


def _score_xz(texts: list[str]) -> Score:
    """One stream has one figure: it has no interval over documents."""
    facts = make_signature(metric="bits_per_byte", model="xz,preset9,one_stream")
    return Score(value=xz_bits_per_byte(texts), interval=None, n=len(texts), signature=facts)


def _short_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
