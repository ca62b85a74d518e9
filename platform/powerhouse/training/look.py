"""A look at a model while it trains: bits per byte of held-out documents, and how it goes on from some prompts.

Shapes: W windows, T positions. A collective: the model may be sharded, so that all ranks must run it equally often. It reads
no random generator but its own and leaves no trace in the training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from powerhouse.errors import ConfigError
from powerhouse.heldout import HELDOUT, bits_per_byte, cut_into_windows, nats_of_windows, read_heldout
from powerhouse.models.adapters import soft_prompt_of
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.generate import GenerationConfig, Generator, generate
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.adapting import insert_prompt
from powerhouse.training.config import TrainingConfig


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
        self._prompts = self._tokenizer.encode_batch(list(watch.prompts)) if watch.prompts else []
        self._num_bytes = 0
        if watch.heldout:
            texts = read_heldout(watch.heldout / HELDOUT)[: watch.num_heldout]
            self._num_bytes = sum(len(text.encode()) for text in texts)
            context = min(model.config.max_position_embeddings, row_length - 1)
            windows = cut_into_windows(self._tokenizer.encode_batch(texts), context, self._tokenizer.end_of_text_id)
            labeled = {"inputs": windows.inputs_WT, "labels": windows.labels_WT}
            self._windows = insert_prompt(labeled, soft_prompt_of(model))

    @property
    def is_wanted(self) -> bool:
        return bool(self._num_bytes or self._prompts)

    def __call__(self) -> Seen:
        was_training = self._model.training
        self._model.eval()
        values = {"heldout_bits_per_byte": self._bits_per_byte()} if self._num_bytes else {}
        samples = self._samples() if self._prompts else {}
        self._model.train(was_training)
        if isinstance(self._model, FSDPModule):
            self._model.reshard()  # the root stays whole after a forward pass, for a backward pass that does not come
        return Seen(values, samples)

    @torch.no_grad()
    def _bits_per_byte(self) -> float:
        """Every rank takes every n-th window, the last round filled up with windows that count nothing."""
        rank, num_ranks, size = dist.get_rank(), dist.get_world_size(), self._config.run.micro_batch_rows
        inputs_WT, labels_WT = self._windows["inputs"], self._windows["labels"]
        num_missing = -len(inputs_WT) % (num_ranks * size)
        inputs_WT = _lengthen(inputs_WT, num_missing, 0)[rank::num_ranks]
        labels_WT = _lengthen(labels_WT, num_missing, -100)[rank::num_ranks]
        nats = torch.zeros(1, dtype=torch.float64, device=self._device)
        for inputs, labels in zip(torch.split(inputs_WT, size), torch.split(labels_WT, size), strict=True):
            nats += nats_of_windows(self._model, inputs.to(self._device), labels.to(self._device)).sum()
        dist.all_reduce(nats)
        return bits_per_byte(float(nats), self._num_bytes)

    def _samples(self) -> dict[str, str]:
        model: Generator = self._model
        how = GenerationConfig(max_tokens=self._config.watch.sample_tokens)
        rows = generate(model, self._prompts, how, {self._tokenizer.end_of_text_id})
        return dict(zip(self._config.watch.prompts, map(self._tokenizer.decode, rows), strict=True))


def _lengthen(rows_WT: Tensor, num_rows: int, filler: int) -> Tensor:
    return torch.cat([rows_WT, rows_WT.new_full((num_rows, rows_WT.shape[1]), filler)])


def check_look(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """Hold what is to be looked at against the model.

    Raises:
        ConfigError: the model does not continue texts, or a prompt leaves no room.
        InputError: there are no held-out documents.
    """
    watch = config.watch
    if not (watch.heldout or watch.prompts):
        return
    if not isinstance(config.shape, DecoderConfig):
        what = type(config.shape).__name__
        raise ConfigError("watch.heldout, watch.prompts: bits per byte and samples are of decoders", got=what)
    if watch.heldout:
        read_heldout(watch.heldout / HELDOUT)
    room = config.shape.max_position_embeddings - watch.sample_tokens
    for prompt in watch.prompts:
        if not 0 < (num_tokens := len(tokenizer.encode(prompt))) <= room:
            raise ConfigError(
                f"watch.prompts: {prompt!r} and watch.sample_tokens do not fit the model's context",
                got=f"{num_tokens} tokens and {watch.sample_tokens} new",
                allowed=f"1 to {room} tokens",
            )
