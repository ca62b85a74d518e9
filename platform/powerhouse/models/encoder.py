"""A bidirectional encoder of BERT's kind (Devlin et al. 2019): learned positions, LayerNorm after the sum, GELU.

Shapes: B rows, T positions, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from powerhouse.models.attention import Kernel, Mask, RowAttention, document_positions
from powerhouse.models.kernels import document_kernel, sdpa_attention
from powerhouse.models.layers import ACTIVATIONS, AttentionShape, Block, Embedding, FeedForward, Linear
from powerhouse.models.model import Finish, Model, ModelConfig


def _size(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 30522,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


class EncoderConfig(ModelConfig):
    """The shape of an encoder; names are those of a Hugging Face `config.json` of a BERT."""

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": _size(128, 2, 2),
        "minilm-l6": _size(384, 6, 12),
        "bert-base": _size(768, 12, 12),
        "bert-large": _size(1024, 24, 16),
    }

    hidden_size: int = Field(gt=0)
    """Model width C."""
    intermediate_size: int = Field(gt=0)
    """Feed-forward width F."""
    num_hidden_layers: int = Field(gt=0)
    """Number of blocks."""
    num_attention_heads: int = Field(gt=0)
    """Heads H; C must be a multiple of it."""
    max_position_embeddings: int = Field(default=512, gt=0)
    """Longest text, in tokens."""
    type_vocab_size: int = Field(default=2, gt=0)
    """Kinds of segments."""
    layer_norm_eps: float = Field(default=1e-12, gt=0)
    """Added under the root of every norm."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """Of the feed-forward and of the masked-LM head."""
    head: Literal["none", "pooler", "masked_lm"] = "masked_lm"
    """masked_lm: logits of every position. pooler: tanh(W x) of the first one. none: only the hidden states."""

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size a multiple of num_attention_heads, not {self.hidden_size}, {self.num_attention_heads}"
            )
        return self


class Encoder(Model):
    """Token ids in; hidden states, or with the masked-LM head logits, out."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        norm = partial(nn.LayerNorm, width, config.layer_norm_eps)
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.embed_positions = Embedding(config.max_position_embeddings, width)
        self.embed_segments = Embedding(config.type_vocab_size, width)
        self.embed_norm = norm()
        self.layers = nn.ModuleDict({str(i): self._block(norm) for i in range(config.num_hidden_layers)})
        if config.head == "pooler":
            self.pooler = Linear(width, width)
        if config.head == "masked_lm":
            self.head_transform = Linear(width, width)
            self.head_norm = norm()
            self.lm_head = Linear(width, config.vocab_size)
        self.tie_weights()

    def _block(self, norm: partial[nn.LayerNorm]) -> Block:
        config = self.config
        heads, width = config.num_attention_heads, config.hidden_size
        shape = AttentionShape(width, heads, heads, width // heads, has_qkv_bias=True, has_output_bias=True)
        mlp = FeedForward(width, config.intermediate_size, config.activation, is_gated=False, has_bias=True)
        return Block(shape, mlp, norm, is_pre_norm=False)

    def tie_weights(self) -> None:
        if self.config.head == "masked_lm":
            self.lm_head.weight = self.embed_tokens.weight

    def tied_names(self) -> dict[str, str]:
        return {"lm_head.weight": "embed_tokens.weight"} if self.config.head == "masked_lm" else {}

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())

    def encode(
        self,
        ids_BT: Tensor,
        valid_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        kernel: Kernel = sdpa_attention,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, C]; `valid_BT` is False at padding, which stands on the right.

        With the numbers of the documents packed in each row, a document's states are those it has alone.
        """
        if documents_BT is not None:
            kernel, positions = document_kernel(ids_BT.device), document_positions(documents_BT)
        else:
            positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        attend = RowAttention(Mask(is_causal=False, valid_BS=valid_BT, document_BS=documents_BT), kernel)
        segments = torch.zeros_like(ids_BT) if segments_BT is None else segments_BT
        x = self.embed_tokens(ids_BT) + self.embed_positions(positions) + self.embed_segments(segments)
        x = self.embed_norm(x)
        for name, block in self.layers.items():
            x = block(x, int(name), attend)
        states: Tensor = x
        return states

    def forward(
        self,
        ids_BT: Tensor,
        valid_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        kernel: Kernel = sdpa_attention,
        documents_BT: Tensor | None = None,
        finish: Finish | None = None,
    ) -> Tensor:
        """fp32 logits [B, T, V] with the masked-LM head, [B, C] with the pooler, else hidden states [B, T, C]."""
        x = self.encode(ids_BT, valid_BT, segments_BT, kernel, documents_BT)
        if self.config.head == "pooler":
            pooled: Tensor = torch.tanh(self.pooler(x[:, 0]))
            return pooled
        return (finish or self.project)(x) if self.config.head == "masked_lm" else x

    def project(self, x: Tensor) -> Tensor:
        x = self.head_norm(ACTIVATIONS[self.config.activation](self.head_transform(x)))
        # Linear with its bias would return a view, on which a sharded model's hooks do not hold.
        return nn.functional.linear(x, self.lm_head.weight).float() + self.lm_head.bias


def pool(hidden_BTC: Tensor, valid_BT: Tensor, how: Literal["mean", "cls"]) -> Tensor:
    """One vector for each text [B, C]: the mean over its tokens, or its first token's."""
    if how == "cls":
        return hidden_BTC[:, 0]
    weights_BT1 = valid_BT.unsqueeze(-1).to(hidden_BTC.dtype)
    return (hidden_BTC * weights_BT1).sum(1) / weights_BT1.sum(1)
