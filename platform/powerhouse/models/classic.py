"""The classic Transformer (Vaswani et al. 2017) as encoder, as decoder and as both.

Sinusoidal positions, LayerNorm after the sum, FFN(x) = max(0, x W1 + b1) W2 + b2, one embedding for all. Shapes: C model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from powerhouse.models.encoder_decoder import EncoderDecoder, Half
from powerhouse.models.layers import AttentionShape, Block, Embedding, FeedForward, Linear, sinusoids
from powerhouse.models.model import ModelConfig


class ClassicConfig(ModelConfig):
    """The shape of the classic Transformer; without decoder layers it is an encoder, without encoder layers a decoder."""

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {"vocab_size": 37000, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        "big": {"vocab_size": 37000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    }

    hidden_size: int = Field(gt=0, multiple_of=2)
    """Model width C."""
    intermediate_size: int = Field(gt=0)
    """Feed-forward width F."""
    num_attention_heads: int = Field(gt=0)
    """Heads H; C must be a multiple of it."""
    num_encoder_layers: int = Field(default=6, ge=0)
    """Blocks of the encoder."""
    num_decoder_layers: int = Field(default=6, ge=0)
    """Blocks of the decoder."""
    max_position_embeddings: int = Field(default=1024, gt=0)
    """Longest text, in tokens."""
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Of the feed-forward; the paper's is relu, Marian's models have silu."""
    scale_embedding: bool = True
    """Embeddings times sqrt(C) (section 3.4)."""
    start_token_id: int = Field(default=0, ge=0)
    """What the decoder begins with."""
    end_token_id: int = Field(default=0, ge=0)
    """What ends a text."""

    @model_validator(mode="after")
    def _has_a_half(self) -> ClassicConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size a multiple of num_attention_heads, not {self.hidden_size}, {self.num_attention_heads}"
            )
        if self.num_encoder_layers + self.num_decoder_layers == 0:
            raise ValueError("layers in the encoder, the decoder or both")
        return self


class Classic(EncoderDecoder):
    config: ClassicConfig
    final_logits_bias: Tensor

    def __init__(self, config: ClassicConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.num_encoder_layers:
            self.encoder = Half([self._block(has_memory=False) for _ in range(config.num_encoder_layers)])
        if config.num_decoder_layers:
            has_memory = config.num_encoder_layers > 0
            self.decoder = Half([self._block(has_memory=has_memory) for _ in range(config.num_decoder_layers)])
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            if has_memory:  # Marian's constant, added to the logits; zeros unless a checkpoint brings others
                self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.tie_weights()

    def _block(self, *, has_memory: bool) -> Block:
        config = self.config
        heads, width = config.num_attention_heads, config.hidden_size
        shape = AttentionShape(width, heads, heads, width // heads, has_qkv_bias=True, has_output_bias=True)
        mlp = FeedForward(width, config.intermediate_size, config.activation, is_gated=False, has_bias=True)
        return Block(shape, mlp, partial(nn.LayerNorm, width), is_pre_norm=False, has_cross_attention=has_memory)

    def tie_weights(self) -> None:
        if self.config.num_decoder_layers:
            self.lm_head.weight = self.embed_tokens.weight

    def tied_names(self) -> dict[str, str]:
        return {"lm_head.weight": "embed_tokens.weight"} if self.config.num_decoder_layers else {}

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        x = x * self.config.hidden_size**0.5 if self.config.scale_embedding else x
        return x + sinusoids(positions, self.config.hidden_size).to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(x)
        return (logits + self.final_logits_bias if self.config.num_encoder_layers else logits).float()
