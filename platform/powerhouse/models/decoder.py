"""A llama-shaped causal decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries, SwiGLU.

Shapes: * leading axes, C model width, V vocabulary. `Decoder(config, range(i, j))` is the slice of layers [i, j): the
first slice also embeds, the last one also norms and projects to the vocabulary. A slice's parameter names are those of
the whole.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from powerhouse.config import Config
from powerhouse.models.attention import Attend, causal_attention
from powerhouse.models.layers import RMSNorm, SelfAttention, SwiGLU, rope_angles


class DecoderConfig(Config):
    """The shape of a decoder; field names are those of a Hugging Face `config.json` of a llama."""

    vocab_size: int = Field(gt=0)
    """Number of token ids."""
    hidden_size: int = Field(gt=0)
    """Model width C."""
    intermediate_size: int = Field(gt=0)
    """Feed-forward width F."""
    num_hidden_layers: int = Field(gt=0)
    """Number of blocks."""
    num_attention_heads: int = Field(gt=0)
    """Query heads H."""
    num_key_value_heads: int = Field(gt=0)
    """Key/value heads K; H must be a multiple of it."""
    head_dim: int = Field(gt=0, multiple_of=2)
    """Width of a head D."""
    max_position_embeddings: int = Field(gt=0)
    """Longest context, in tokens."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added under the root of every norm."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary angles."""
    tie_word_embeddings: bool = True
    """The output projection is the embedding's matrix."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of fresh weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads a multiple of num_key_value_heads, not {heads} and {kv_heads}")
        return self


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DecoderBody(nn.Module):
    """What a llama checkpoint keeps under the prefix `model.`; a slice has only its part."""

    embed_tokens: nn.Embedding
    norm: RMSNorm

    def __init__(self, config: DecoderConfig, layers: range) -> None:
        super().__init__()
        if layers.start == 0:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): DecoderBlock(config) for i in layers})
        if layers.stop == config.num_hidden_layers:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids in, logits out; or, as a slice, the hidden states between."""

    def __init__(self, config: DecoderConfig, layers: range | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = range(config.num_hidden_layers) if layers is None else layers
        self.is_first = self.layers.start == 0
        self.is_last = self.layers.stop == config.num_hidden_layers
        self.model = DecoderBody(config, self.layers)
        if self.is_last:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make embedding and head one parameter again, where this slice holds both; called after weights are assigned."""
        if self.config.tie_word_embeddings and self.is_first and self.is_last:
            self.lm_head.weight = self.model.embed_tokens.weight

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by their number: the units that sharding, checkpointing and compilation wrap."""
        return dict(self.model.layers.items())

    def forward(self, x: Tensor, positions: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Run ids [*] (first slice) or hidden states [*, C] to hidden states [*, C], or to fp32 logits [*, V] (last)."""
        return self.project(self.transform(x, positions, attend)) if self.is_last else self.transform(x, positions, attend)

    def transform(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Everything before the vocabulary: hidden states [*, C]. The engine projects only the rows it samples."""
        if self.is_first:
            x = self.model.embed_tokens(x)
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        for name, block in self.model.layers.items():
            x = block(x, rope, int(name), attend)
        return x

    def project(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model.norm(x)).float()
        return logits

    def initialise(self, seed: int) -> None:
        """Fill every parameter from a generator seeded by (seed, its name): the same for any slicing or sharding."""
        for name, parameter in self.named_parameters():
            fill_parameter(parameter.data, name, seed, self.config.initializer_range)


def fill_parameter(data: Tensor, name: str, seed: int, std: float) -> None:
    """Norms become ones, matrices normal(0, std)."""
    if data.dim() == 1:
        data.fill_(1.0)
        return
    generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
    data.copy_(torch.empty(data.shape).normal_(0.0, std, generator=generator))


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over the labels that are not -100."""
    return F.cross_entropy(logits_BTV.flatten(0, -2), labels_BT.flatten(), ignore_index=-100, reduction="sum")


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads; the rotary base stands where both its 4th and 5th version look."""
    values = config.model_dump()
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    fixed = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "rope_parameters": rope,
    }
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values, **fixed}
