"""Encoder-decoders, and the first of them: T5 (Raffel et al. 2020). The classic Transformer is in `classic.py`.

Shapes: B rows, S source positions, T target positions, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from powerhouse.models.attention import Attend, Kernel, Mask, RowAttention, document_positions
from powerhouse.models.kernels import causal_attention, document_kernel, sdpa_attention
from powerhouse.models.layers import (
    AttentionShape,
    Block,
    Embedding,
    FeedForward,
    Linear,
    Memory,
    RelativeBias,
    RMSNorm,
)
from powerhouse.models.model import Finish, Model, ModelConfig

_UNTIED = {"tie_word_embeddings": False, "scale_logits": False}


def _t5_size(width: int, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 32128, "hidden_size": width, "intermediate_size": hidden, "head_dim": 64}
    return sizes | {"num_encoder_layers": layers, "num_decoder_layers": layers, "num_attention_heads": heads} | more


class T5Config(ModelConfig):
    """The shape of a T5."""

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "t5-small": _t5_size(512, 2048, 6, 8),
        "t5-base": _t5_size(768, 3072, 12, 12),
        "flan-t5-small": _t5_size(512, 1024, 8, 6, is_gated=True, activation="gelu_tanh", **_UNTIED),
        "flan-t5-base": _t5_size(768, 2048, 12, 12, is_gated=True, activation="gelu_tanh", **_UNTIED),
    }

    hidden_size: int = Field(gt=0)
    """Model width C."""
    intermediate_size: int = Field(gt=0)
    """Feed-forward width F."""
    num_encoder_layers: int = Field(gt=0)
    """Blocks of the encoder."""
    num_decoder_layers: int = Field(gt=0)
    """Blocks of the decoder."""
    num_attention_heads: int = Field(gt=0)
    """Heads H."""
    head_dim: int = Field(gt=0)
    """Width of a head D; H x D need not be C."""
    num_buckets: int = Field(default=32, gt=3, multiple_of=4)
    """Buckets of the relative position bias."""
    max_distance: int = Field(default=128, gt=0)
    """Distances from here on share a bucket."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Added under the root of every norm."""
    is_gated: bool = False
    """Gated feed-forward, as in T5 1.1."""
    activation: Literal["relu", "gelu_tanh", "gelu", "silu"] = "relu"
    """Of the feed-forward."""
    tie_word_embeddings: bool = True
    """The output projection is the embedding's matrix."""
    scale_logits: bool = True
    """The output projection's input is scaled by 1 / sqrt(C), as in the first T5; 1.1 does not."""
    start_token_id: int = Field(default=0, ge=0)
    """What the decoder begins with."""
    end_token_id: int = Field(default=1, ge=0)
    """What ends a text."""


class Half(nn.Module):
    """The blocks of an encoder or of a decoder, with T5's bias and last norm where the family has them."""

    def __init__(self, blocks: list[Block], norm: nn.Module | None = None, bias: RelativeBias | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.norm = norm
        self.relative_bias = bias

    def forward(self, x: Tensor, attend: Attend, memory: Memory | None = None) -> Tensor:
        for name, block in self.layers.items():
            x = block(x, int(name), attend, bias=self.relative_bias, memory=memory)
        return x if self.norm is None else self.norm(x)


class EncoderDecoder(Model):
    """What both families share: encode to a memory, decode over it with or without a cache."""

    encoder: Half
    decoder: Half
    lm_head: Linear

    @property
    def takes_source(self) -> bool:
        """Whether the decoder looks at an encoder's memory."""
        return hasattr(self, "encoder")

    def blocks(self) -> dict[str, nn.Module]:
        halves = {name: half for name in ("encoder", "decoder") if (half := getattr(self, name, None)) is not None}
        return {f"{name}.{i}": block for name, half in halves.items() for i, block in half.layers.items()}

    def encode(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        kernel: Kernel = sdpa_attention,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, S, C]; `valid_BS` is False at padding, which stands on the right.

        With the numbers of the documents packed in each row, a document's states are those it has alone.
        """
        attend = RowAttention(Mask(is_causal=False, valid_BS=valid_BS, document_BS=documents_BS), kernel)
        if documents_BS is not None:
            positions = document_positions(documents_BS)
        else:
            positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        states: Tensor = self.encoder(self.embed(ids_BS, positions), attend)
        return states

    def remember(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        kernel: Kernel = sdpa_attention,
        documents_BS: Tensor | None = None,
        target_documents_BT: Tensor | None = None,
    ) -> Memory:
        """Encode the source for `forward`; a packed target looks at the source of the same number."""
        if documents_BS is not None:
            kernel = document_kernel(ids_BS.device)
        mask = Mask(is_causal=False, valid_BS=valid_BS, document_BS=documents_BS, query_document_BT=target_documents_BT)
        return Memory(self.encode(ids_BS, valid_BS, kernel, documents_BS), RowAttention(mask, kernel))

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor,
        memory: Memory | None,
        attend: Attend = causal_attention,
        finish: Finish | None = None,
    ) -> Tensor:
        """fp32 logits [B, T, V] of the target so far; a decoder without encoder takes no memory."""
        return (finish or self.project)(self.decoder(self.embed(ids_BT, positions), attend, memory))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class T5(EncoderDecoder):
    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.encoder = self._half(config.num_encoder_layers, is_decoder=False)
        self.decoder = self._half(config.num_decoder_layers, is_decoder=True)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def _half(self, num_layers: int, *, is_decoder: bool) -> Half:
        config = self.config
        heads, width = config.num_attention_heads, config.hidden_size
        shape = AttentionShape(width, heads, heads, config.head_dim, is_scaled=False)
        norm = partial(RMSNorm, width, config.rms_norm_eps)
        blocks = [Block(shape, self._mlp(), norm, has_cross_attention=is_decoder) for _ in range(num_layers)]
        return Half(blocks, norm(), RelativeBias(config.num_buckets, config.max_distance, heads, is_causal=is_decoder))

    def _mlp(self) -> FeedForward:
        config = self.config
        return FeedForward(
            config.hidden_size, config.intermediate_size, config.activation, is_gated=config.is_gated, has_bias=False
        )

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def tied_names(self) -> dict[str, str]:
        return {"lm_head.weight": "embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def initial_std(self, name: str) -> float:
        """As Mesh TensorFlow fills a T5: by fan-in, queries smaller because their scores are not scaled."""
        config = self.config
        if "q_proj" in name:
            return float((config.hidden_size * config.head_dim) ** -0.5)
        if "o_proj" in name:
            return float((config.num_attention_heads * config.head_dim) ** -0.5)
        if "down_proj" in name:
            return float(config.intermediate_size**-0.5)
        return 1.0 if "embed_tokens" in name or "lm_head" in name else float(config.hidden_size**-0.5)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        return x

    def project(self, x: Tensor) -> Tensor:
        x = x * self.config.hidden_size**-0.5 if self.config.scale_logits else x
        logits: Tensor = self.lm_head(x).float()
        return logits
