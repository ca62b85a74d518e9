"""What a run trains and on what: the model's family, its objective, and how rows of tokens become its batches.

Shapes: B rows, R tokens in a row, S source positions, T positions. A new method is a new entry of METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from powerhouse.corpora.shards import Rows
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.encoder_decoder import T5, T5Config
from powerhouse.models.model import Model, ModelConfig
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.noise import Indices, SpanLengths, corrupt_spans, mask_tokens
from powerhouse.training.objectives import (
    Batch,
    Objective,
    causal_language_model,
    masked_language_model,
    sequence_to_sequence,
)  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """What gap-filling needs to know; a causal model needs none of it."""

    seed: int
    share: float
    """Share of a row's tokens that are hidden."""
    mean_span: float
    """Mean length of a hidden span of a T5."""
    num_tokens: int
    """Size of the tokenizer's vocabulary."""
    end_id: int
    """What ends a text."""
    special_tokens: tuple[str, ...]
    """The method's own tokens: the mask, or a sentinel for each span."""
    special_ids: tuple[int, ...]
    """Their ids: the tokenizer's, or those after its vocabulary."""


@dataclass(frozen=True)
class Method:
    config_class: type[ModelConfig]
    model_class: type[Model]
    objective: Objective
    make_batch: Callable[[Rows, Indices, Noise], dict[str, Indices]]
    name_special_tokens: Callable[[Tokenizer, SpanLengths], list[str]]
    predicts_next: bool = False
    """The last token of a row is only predicted."""

    def num_positions(self, row_length: int) -> int:
        """Tokens of a row that the model sees."""
        return row_length - self.predicts_next

    def make_noise(self, tokenizer: Tokenizer, row_length: int, *, seed: int, share: float, mean_span: float) -> Noise:
        names = self.name_special_tokens(tokenizer, SpanLengths.of(row_length, share, mean_span))
        new_ids = count(tokenizer.vocab_size)
        ids = [next(new_ids) if (known := tokenizer.core.token_to_id(name)) is None else known for name in names]
        return Noise(seed, share, mean_span, tokenizer.vocab_size, tokenizer.end_of_text_id, tuple(names), tuple(ids))

    def batch(self, rows_BR: Rows, places_B: Indices, noise: Noise, device: torch.device) -> Batch:
        arrays = self.make_batch(rows_BR, places_B, noise)
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


def _causal(rows_BR: Rows, places_B: Indices, noise: Noise) -> dict[str, Indices]:
    """Every token is predicted from those before it in its row: T = R - 1."""
    tokens_BR = rows_BR.astype(np.int64)
    return {"inputs": tokens_BR[:, :-1], "labels": tokens_BR[:, 1:]}


def _masked(rows_BR: Rows, places_B: Indices, noise: Noise) -> dict[str, Indices]:
    inputs_BT, labels_BT = mask_tokens(
        rows_BR, places_B, seed=noise.seed, share=noise.share, mask_id=noise.special_ids[0], vocab_size=noise.num_tokens
    )
    return {"inputs": inputs_BT, "labels": labels_BT}


def _spans(rows_BR: Rows, places_B: Indices, noise: Noise) -> dict[str, Indices]:
    """The decoder is shown the end of a text, which is also its start token, and then each target but the last."""
    lengths = SpanLengths.of(rows_BR.shape[1], noise.share, noise.mean_span)
    sources_BS, targets_BT = corrupt_spans(
        rows_BR, places_B, seed=noise.seed, lengths=lengths, sentinels=noise.special_ids, end_id=noise.end_id
    )
    starts_B1 = np.full((len(targets_BT), 1), noise.end_id)
    return {"sources": sources_BS, "inputs": np.concatenate([starts_B1, targets_BT[:, :-1]], axis=1), "labels": targets_BT}


def _no_tokens(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return []


def _mask(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return [tokenizer.special_tokens.get("mask_token", "<mask>")]


def _sentinels(tokenizer: Tokenizer, lengths: SpanLengths) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(lengths.num_spans)]


METHODS = {
    "decoder": Method(DecoderConfig, Decoder, causal_language_model, _causal, _no_tokens, predicts_next=True),
    "encoder": Method(EncoderConfig, Encoder, masked_language_model, _masked, _mask),
    "t5": Method(T5Config, T5, sequence_to_sequence, _spans, _sentinels),
}
"""Family of the model -> how it is pretrained: next tokens, masked tokens, corrupted spans."""


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
