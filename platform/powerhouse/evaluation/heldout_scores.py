"""Bits per byte of held-out documents: under a model in a pool of actors, under token frequencies, under xz."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import powerhouse
from powerhouse.artifacts import Counts
from powerhouse.corpora.shards import TokenRows
from powerhouse.device import choose_device, to_dtype
from powerhouse.evaluation.perplexity import finalise_bits_per_byte, nats_of_documents, unigram_nats, xz_bits_per_byte
from powerhouse.evaluation.score import Score, make_score, make_signature
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.heldout import HELDOUT, read_heldout
from powerhouse.models.hub import load_decoder, read_config
from powerhouse.telemetry import progress
from powerhouse.tokenizer import FILE as TOKENIZER_FILE
from powerhouse.tokenizer import Tokenizer


def score_heldout(config: EvaluationConfig, corpus: Path, tokens: Path) -> tuple[dict[str, Score], Counts]:
    """Bits per byte of the model, of token frequencies and of `xz -9` on the same documents, and how many these are.

    Raises:
        InputError: there is no held-out document.
    """
    assert config.model is not None, "a directory is given"
    texts = read_heldout(corpus / HELDOUT)
    num_bytes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    scores = {
        "bits_per_byte": _score_model(config, config.model, texts, num_bytes),
        "unigram_bits_per_byte": _score_unigram(tokens, texts, num_bytes),
        "xz_bits_per_byte": _score_xz(texts),
    }
    return scores, {"documents": len(texts), "bytes": int(num_bytes.sum())}


def _score_model(config: EvaluationConfig, model: Path, texts: list[str], num_bytes: npt.NDArray[np.float64]) -> Score:
    nats = _nats_in_pool(config, texts)
    facts = make_signature(
        metric="bits_per_byte",
        tokenizer=_short_hash(model / TOKENIZER_FILE),
        context=read_config(model).max_position_embeddings,
        windows="disjoint",
        start="end_of_text",
        precision=config.precision,
        version=powerhouse.__version__,
    )
    return make_score(np.stack([nats, num_bytes], axis=1), finalise_bits_per_byte, facts)


def _nats_in_pool(config: EvaluationConfig, texts: list[str]) -> npt.NDArray[np.float64]:
    """Nats of each text, in the texts' order; long and short documents alike go to whichever actor is free."""
    from powerhouse.evaluation.pool import in_pool  # Ray takes a second to load: not for --check, which only asks

    nats = np.zeros(len(texts))
    with progress("scoring", len(texts), "document") as bar:
        for row in in_pool(ModelScorer, (config,), {"number": range(len(texts)), "text": texts}, config):
            nats[row["number"]] = row["nats"]
            bar.update()
    return nats


class ModelScorer:
    """A Ray Data actor: documents in, nats out."""

    def __init__(self, config: EvaluationConfig) -> None:
        assert config.model is not None, "a directory is given"
        device = choose_device(config.device)
        if device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        self.model = load_decoder(config.model, dtype=to_dtype(config.precision), device=device)
        self.tokenizer = Tokenizer.load(config.model)
        self.batch_windows = config.batch_windows

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        documents = self.tokenizer.encode_batch(batch["text"].tolist())
        nats = nats_of_documents(self.model, documents, self.tokenizer.end_of_text_id, self.batch_windows)
        return {"number": batch["number"], "nats": np.array(nats)}


def _score_unigram(tokens: Path, texts: list[str], num_bytes: npt.NDArray[np.float64]) -> Score:
    tokenizer = Tokenizer.load(tokens)
    rows = TokenRows(tokens / "rows")
    counts_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(rows), 1024):
        counts_V += np.bincount(rows.take(np.arange(start, min(start + 1024, len(rows)))).reshape(-1), minlength=len(counts_V))
    costs_V = unigram_nats(counts_V)
    nats = np.array([costs_V[ids].sum() for ids in tokenizer.encode_batch(texts)])
    tokenizer_hash = _short_hash(tokens / TOKENIZER_FILE)
    facts = make_signature(metric="bits_per_byte", model="unigram,add-one", tokenizer=tokenizer_hash)
    return make_score(np.stack([nats, num_bytes], axis=1), finalise_bits_per_byte, facts)


def _score_xz(texts: list[str]) -> Score:
    """One stream has one figure: it has no interval over documents."""
    facts = make_signature(metric="bits_per_byte", model="xz,preset9,one_stream")
    return Score(value=xz_bits_per_byte(texts), interval=None, n=len(texts), signature=facts)


def _short_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
