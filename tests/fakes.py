"""Small real things that many tests need: a tiny decoder with seeded weights, its directory, adapters, a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from powerhouse.models.adapters import Adapter, AdapterConfig, adapter_parameters, add_adapter
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.hub import format_of, save_model
from powerhouse.models.hugging_face.adapter import save_adapter
from powerhouse.tokenizer import Tokenizer

TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse.",
    "The quick brown fox jumps over the lazy dog, and the dog, être naïf, sleeps on: 猫も眠る 🐈.",
]


def tiny_config(**changes: object) -> DecoderConfig:
    shape: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return DecoderConfig.model_validate(shape | changes)


def tiny_decoder(seed: int = 0, **changes: object) -> Decoder:
    model = Decoder(tiny_config(**changes))
    model.initialise(seed)
    return model.eval()


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 300)


def write_tiny_model(directory: Path, seed: int = 0, **changes: object) -> Path:
    """Write a whole model directory: weights, config and tokenizer."""
    model = tiny_decoder(seed, **changes)
    save_model(directory, model.config, model.state_dict())
    tiny_tokenizer().save(directory)
    return directory


def write_tiny_adapter(directory: Path, base: Path, config: AdapterConfig, seed: int = 0) -> Path:
    """Write an adapter for the tiny model of which no tensor is zero."""
    model = tiny_decoder()
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(item.shape, generator=generator) * 0.3 for name, item in adapter_parameters(model).items()}
    save_adapter(directory, Adapter(config, tensors), format_of(model.config), model.config, base)
    return directory
