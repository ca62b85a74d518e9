"""A look at a model while it trains: how well it does on held-out text, and how it goes on from some prompts.

A decoder's figure on documents is bits per byte. An encoder's or a T5's is the loss of its own method, in nats per token that
it predicts, with the same tokens hidden at every look; so is that of any family on rows that were packed from held-out records.
A collective: the model may be sharded, so that all ranks must run it equally often. It reads no random generator but its own
and leaves no trace in the training. Shapes: N rows, R tokens in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from powerhouse.corpora.shards import TokenRows
from powerhouse.heldout import HELDOUT, bits_per_byte, cut_into_windows, read_heldout
from powerhouse.models.adapters import soft_prompt_of
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.generate import GenerationConfig, Generator, generate
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.adapting import insert_prompt
from powerhouse.training.batches import PackedRows
from powerhouse.training.checks import is_rows
from powerhouse.training.config import TrainingConfig
from powerhouse.training.methods import method_of
from powerhouse.training.noise import IGNORED
from powerhouse.training.objectives import Batch
from powerhouse.training.rows import ROWS


@dataclass(frozen=True)
class Seen:
    values: dict[str, float] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    """Prompt -> how the model goes on."""


class Look:
    """What to look at, read and tokenised once."""

    def __init__(self, config: TrainingConfig, model: Any, row_length: int, device: torch.device) -> None:
        watch, self._config, self._model, self._device = config.watch, config, model, device
        self._tokenizer = Tokenizer.load(config.tokens)
        self._prompts = _encode_prompts(config, self._tokenizer)
        self._batch: Batch | None = None
        self._num_bytes = 0
        if watch.heldout:
            batch, self._num_bytes = _read_batch(config, self._tokenizer, row_length)
            self._batch = insert_prompt(batch, soft_prompt_of(model))

    @property
    def is_wanted(self) -> bool:
        return bool(self._batch or self._prompts)

    def __call__(self) -> Seen:
        was_training = self._model.training
        self._model.eval()
        values = self._figure(self._batch) if self._batch else {}
        samples = self._samples() if self._prompts else {}
        self._model.train(was_training)
        if isinstance(self._model, FSDPModule):
            self._model.reshard()  # the root stays whole after a forward pass, for a backward pass that does not come
        return Seen(values, samples)

    @torch.no_grad()
    def _figure(self, batch: Batch) -> dict[str, float]:
        """Every rank takes every n-th row, the last round filled up with rows that count nothing."""
        rank, num_ranks, run = dist.get_rank(), dist.get_world_size(), self._config.run
        num_missing = -len(batch["labels"]) % (num_ranks * run.micro_batch_rows)
        here = {name: _lengthen(rows, num_missing, name)[rank::num_ranks].to(self._device) for name, rows in batch.items()}
        objective = partial(method_of(self._config.shape).objective, chunk_tokens=run.loss_chunk_tokens)
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        for start in range(0, len(here["labels"]), run.micro_batch_rows):
            part = {name: rows[start : start + run.micro_batch_rows] for name, rows in here.items()}
            totals += torch.stack([total.double() for total in objective(self._model, part)])
        dist.all_reduce(totals)
        nats, num_predicted = float(totals[0]), float(totals[1])
        if self._num_bytes:
            return {"heldout_bits_per_byte": bits_per_byte(nats, self._num_bytes)}
        return {"heldout_loss": nats / num_predicted}

    def _samples(self) -> dict[str, str]:
        model: Generator = self._model
        how = GenerationConfig(max_tokens=self._config.watch.sample_tokens)
        rows = generate(model, self._prompts, how, {self._tokenizer.end_of_text_id})
        return dict(zip(self._config.watch.prompts, map(self._tokenizer.decode, rows), strict=True))


def _encode_prompts(config: TrainingConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """A decoder goes on from it; a T5 answers it as the source that it is, with its end."""
    ends = [tokenizer.end_of_text_id] if isinstance(config.shape, T5Config) else []
    return [[*ids, *ends] for ids in tokenizer.encode_batch(list(config.watch.prompts))] if config.watch.prompts else []


def _read_batch(config: TrainingConfig, tokenizer: Tokenizer, row_length: int) -> tuple[Batch, int]:
    """What is held out, as the method's objective takes it, and its bytes where bits are to be told per byte, else 0."""
    heldout, num_heldout = config.watch.heldout, config.watch.num_heldout
    assert heldout is not None, "there is something to read"
    if is_rows(config):
        rows = TokenRows(heldout / ROWS)
        numbers_N = np.arange(min(num_heldout, len(rows)))
        documents_NR = rows.take_documents(numbers_N) if config.masks_documents or rows.tells_learned else None
        learned_NR = rows.take_learned(numbers_N) if rows.tells_learned else None
        return _method_batch(config, tokenizer, PackedRows(rows.take(numbers_N), numbers_N, documents_NR, learned_NR)), 0
    texts = read_heldout(heldout / HELDOUT)[:num_heldout]
    documents, end_id = tokenizer.encode_batch(texts), tokenizer.end_of_text_id
    if isinstance(config.shape, DecoderConfig):
        windows = cut_into_windows(documents, min(config.shape.max_position_embeddings, row_length - 1), end_id)
        batch = {"inputs": windows.inputs_WT, "labels": windows.labels_WT}
        return batch, sum(len(text.encode()) for text in texts)
    ids = np.array([token_id for document in documents for token_id in (*document, end_id)], dtype=np.int32)
    rows_NR = np.resize(ids, (max(len(ids) // row_length, 1), row_length))  # over and over, where it is shorter than a row
    return _method_batch(config, tokenizer, PackedRows(rows_NR, np.arange(len(rows_NR)))), 0


def _method_batch(config: TrainingConfig, tokenizer: Tokenizer, rows: PackedRows) -> Batch:
    noise, method = config.make_noise(tokenizer, rows.tokens_BR.shape[1]), method_of(config.shape)
    return method.batch(rows.tokens_BR, rows.places_B, noise, torch.device("cpu"), rows.documents_BR, rows.learned_BR)


def _lengthen(rows: Tensor, num_rows: int, name: str) -> Tensor:
    return torch.cat([rows, rows.new_full((num_rows, rows.shape[1]), IGNORED if name == "labels" else 0)])
