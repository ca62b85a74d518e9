"""What a run trains and on what: the model's family, its objective, and how rows of tokens become its batches.

A new method is a new entry of METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from powerhouse.corpora.shards import Marks, Rows
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.encoder_decoder import T5, T5Config
from powerhouse.models.model import Model, ModelConfig
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.batches import Arrays, Noise, PackedRows, causal_batch, masked_batch, sequence_batch
from powerhouse.training.noise import Indices, SpanLengths
from powerhouse.training.objectives import (
    Batch,
    causal_language_model,
    masked_language_model,
    sequence_to_sequence,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    config_class: type[ModelConfig]
    model_class: type[Model]
    objective: Callable[..., tuple[Tensor, Tensor]]
    """An `Objective`, given also `chunk_tokens`."""
    make_batch: Callable[[PackedRows, Noise], Arrays]
    name_special_tokens: Callable[[Tokenizer, SpanLengths], list[str]]
    predicts_next: bool = False
    """The last token of a row is only predicted."""

    def num_positions(self, row_length: int) -> int:
        """Tokens of a row that the model sees."""
        return row_length - self.predicts_next

    def make_noise(
        self,
        tokenizer: Tokenizer,
        row_length: int,
        *,
        seed: int,
        share: float,
        mean_span: float,
        start_id: int | None = None,
    ) -> Noise:
        names = self.name_special_tokens(tokenizer, SpanLengths.of(row_length, share, mean_span))
        new_ids = count(tokenizer.vocab_size)
        ids = [next(new_ids) if (known := tokenizer.core.token_to_id(name)) is None else known for name in names]
        end_id = tokenizer.end_of_text_id
        start_id = end_id if start_id is None else start_id
        return Noise(seed, share, mean_span, tokenizer.vocab_size, start_id, end_id, tuple(names), tuple(ids))

    def batch(
        self,
        rows_BR: Rows,
        places_B: Indices,
        noise: Noise,
        device: torch.device,
        documents_BR: Rows | None = None,
        learned_BR: Marks | None = None,
    ) -> Batch:
        """What the objective is given for these rows; see `PackedRows`."""
        arrays = self.make_batch(PackedRows(rows_BR, places_B, documents_BR, learned_BR), noise)
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


def _no_tokens(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return []


def _mask(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return [tokenizer.special_tokens.get("mask_token", "<mask>")]


def _sentinels(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(lengths.num_spans)]


METHODS = {
    "decoder": Method(DecoderConfig, Decoder, causal_language_model, causal_batch, _no_tokens, predicts_next=True),
    "encoder": Method(EncoderConfig, Encoder, masked_language_model, masked_batch, _mask),
    "t5": Method(T5Config, T5, sequence_to_sequence, sequence_batch, _sentinels),
}
"""Family of the model -> how it is trained: on next tokens, masked tokens, corrupted spans or pairs."""


def method_of(config: ModelConfig) -> Method:
    return next(method for method in METHODS.values() if isinstance(config, method.config_class))


def make_shape(value: Any) -> Any:
    """The typed shape out of a config's `model`: a name of a family's sizes, or settings with `family`, by default decoder."""
    if isinstance(value, str):
        families = [method.config_class for method in METHODS.values() if value in method.config_class.SIZES]
        if not families:
            names = sorted(name for method in METHODS.values() for name in method.config_class.SIZES)
            raise ValueError(f"one of {', '.join(names)}, or a mapping")
        return families[0].model_validate(value)
    if not isinstance(value, Mapping):
        return value
    family = value.get("family", "decoder")
    if family not in METHODS:
        raise ValueError(f"a family of {', '.join(METHODS)}")
    return METHODS[family].config_class.model_validate({name: item for name, item in value.items() if name != "family"})
