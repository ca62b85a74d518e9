"""A causal decoder of llama's kind (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries, SwiGLU.

Its options make it a Mistral, a Qwen2 or a Qwen3. Shapes: * leading axes, C model width, V vocabulary.
`Decoder(config, range(i, j))` is the slice of layers [i, j): the first slice also embeds, the last one also norms and
projects to the vocabulary. A slice's parameter names are those of the whole, and of a Hugging Face checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from powerhouse.models.attention import Attend
from powerhouse.models.kernels import causal_attention
from powerhouse.models.layers import AttentionShape, Block, Embedding, FeedForward, Linear, RMSNorm
from powerhouse.models.model import Finish, Model, ModelConfig
from powerhouse.models.rope import RopeScaling, rope_angles


def _size(width: int, hidden: int, layers: int, heads: int, kv_heads: int, context: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": context,
        **more,
    }


class DecoderConfig(ModelConfig):
    """The shape of a decoder; most names are those of a Hugging Face `config.json` of a llama."""

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": _size(192, 512, 4, 4, 2, 256, vocab_size=4096),
        "smollm2-135m": _size(576, 1536, 30, 9, 3, 8192, vocab_size=49152, rope_theta=1e5),
        "smollm2-360m": _size(960, 2560, 32, 15, 5, 8192, vocab_size=49152, rope_theta=1e5),
        "llama-3.2-1b": _size(2048, 8192, 16, 32, 8, 131072, vocab_size=128256, rope_theta=5e5, rope_scaling={
            "kind": "llama3", "factor": 32.0, "original_context": 8192}),
        "llama-3.1-8b": _size(4096, 14336, 32, 32, 8, 131072, vocab_size=128256, rope_theta=5e5, rope_scaling={
            "kind": "llama3", "factor": 8.0, "original_context": 8192}, tie_word_embeddings=False),
        "qwen3-0.6b": _size(1024, 3072, 28, 16, 8, 40960, vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6,
                            architecture="qwen3", has_qk_norm=True) | {"head_dim": 128},
        "mistral-7b": _size(4096, 14336, 32, 32, 8, 32768, vocab_size=32768, rope_theta=1e6,
                            architecture="mistral", tie_word_embeddings=False),
    }  # fmt: skip

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """Name under which Hugging Face knows the shape: the `model_type` of an export."""
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
    rope_scaling: RopeScaling | None = None
    """How the angles are stretched over a longer context than that of the first training."""
    has_qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    has_output_bias: bool = False
    """Bias of attention's output projection."""
    has_mlp_bias: bool = False
    """Biases of the feed-forward projections."""
    has_qk_norm: bool = False
    """RMSNorm of every query and key head."""
    sliding_window: int | None = Field(default=None, gt=0)
    """A token sees this many positions, its own counted, in the layers that slide."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers that see everything although there is a window."""
    tie_word_embeddings: bool = True
    """The output projection is the embedding's matrix."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads a multiple of num_key_value_heads, not {heads} and {kv_heads}")
        return self

    def window(self, layer: int) -> int | None:
        """How far back a layer sees."""
        return None if layer in self.full_attention_layers else self.sliding_window


class DecoderBody(nn.Module):
    """What a llama checkpoint keeps under the prefix `model.`; a slice has only its part."""

    embed_tokens: Embedding
    norm: RMSNorm

    def __init__(self, config: DecoderConfig, layers: range) -> None:
        super().__init__()
        if layers.start == 0:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): _block(config) for i in layers})
        if layers.stop == config.num_hidden_layers:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def _block(config: DecoderConfig) -> Block:
    shape = AttentionShape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        has_qkv_bias=config.has_qkv_bias,
        has_output_bias=config.has_output_bias,
        qk_norm_eps=config.rms_norm_eps if config.has_qk_norm else None,
    )
    mlp = FeedForward(config.hidden_size, config.intermediate_size, "silu", is_gated=True, has_bias=config.has_mlp_bias)
    return Block(shape, mlp, partial(RMSNorm, config.hidden_size, config.rms_norm_eps))


class Decoder(Model):
    """Token ids in, logits out; or, as a slice, the hidden states between."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, layers: range | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = range(config.num_hidden_layers) if layers is None else layers
        self.is_first = self.layers.start == 0
        self.is_last = self.layers.stop == config.num_hidden_layers
        self.model = DecoderBody(config, self.layers)
        if self.is_last:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings and self.is_first and self.is_last:
            self.lm_head.weight = self.model.embed_tokens.weight

    def tied_names(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.model.layers.items())

    def forward(self, x: Tensor, positions: Tensor, attend: Attend = causal_attention, finish: Finish | None = None) -> Tensor:
        """Run ids [*] (first slice) or hidden states [*, C] to hidden states [*, C], or to fp32 logits [*, V] (last)."""
        x = self.transform(x, positions, attend)
        return (finish or self.project)(x) if self.is_last else x

    def transform(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Everything before the vocabulary: hidden states [*, C]. The engine projects only the rows it samples."""
        if self.is_first:
            x = self.model.embed_tokens(x)
        config = self.config
        rope = rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        for name, block in self.model.layers.items():
            x = block(x, int(name), attend, rope=rope, window=config.window(int(name)))
        return x

    def project(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model.norm(x)).float()
        return logits
