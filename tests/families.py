"""Tiny models of every family and option, with weights in which nothing is hidden by being 0 or 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from powerhouse.models.classic import Classic, ClassicConfig
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.encoder_decoder import T5, T5Config
from powerhouse.models.hub import save_model
from powerhouse.models.model import Model

VOCAB, LENGTH = 60, 24
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied, all heads with their own keys": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama, biases everywhere": {"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
    "llama, wide heads": {"head_dim": 12, "rope_theta": 500.0},
    "llama, linear rope scaling": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "llama, dynamic rope scaling": {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_context": 16}},
    "llama, llama3 rope scaling": {"rope_scaling": LLAMA3},
    "mistral": {"architecture": "mistral"},
    "mistral, window": {"architecture": "mistral", "sliding_window": 5, "tie_word_embeddings": False},
    "qwen2": {"architecture": "qwen2", "has_qkv_bias": True},
    "qwen2, upper layers slide": {
        "architecture": "qwen2", "has_qkv_bias": True, "sliding_window": 5, "full_attention_layers": (0,)},
    "qwen3": {"architecture": "qwen3", "has_qk_norm": True, "head_dim": 16},
    "qwen3, biases, every layer slides": {
        "architecture": "qwen3", "has_qk_norm": True, "has_qkv_bias": True, "has_output_bias": True, "sliding_window": 4},
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "masked LM": {"head": "masked_lm"},
    "masked LM, relu": {"head": "masked_lm", "activation": "relu"},
    "pooler": {"head": "pooler"},
    "bare, tanh gelu": {"head": "none", "activation": "gelu_tanh"},
}
T5_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_encoder_layers": 2, "num_decoder_layers": 3,
    "num_attention_heads": 4, "head_dim": 6, "num_buckets": 8, "max_distance": 16,
}  # fmt: skip
T5S: dict[str, dict[str, Any]] = {
    "relu, tied": {},
    "gated gelu, untied": {"is_gated": True, "activation": "gelu_tanh", "tie_word_embeddings": False, "scale_logits": False},
    "gated silu, tied": {"is_gated": True, "activation": "silu"},
}
CLASSIC = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_encoder_layers": 2, "num_decoder_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "start_token_id": 3,
}  # fmt: skip
CLASSICS: dict[str, dict[str, Any]] = {
    "relu": {},
    "silu, embedding as it is": {"activation": "silu", "scale_embedding": False},
}

CLASSES: dict[type, type[Model]] = {DecoderConfig: Decoder, EncoderConfig: Encoder, T5Config: T5, ClassicConfig: Classic}


def build(config_class: Any, values: dict[str, Any]) -> Model:
    """A model in which no parameter has a value that would hide it: no bias is 0, no norm 1."""
    model = CLASSES[config_class](config_class.model_validate(values))
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def export(model: Model, directory: Path) -> Path:
    save_model(directory, model.config, model.state_dict())
    return directory
