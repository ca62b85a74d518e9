"""A decoder rebuilt for speed out of a loaded one: the same numbers from fewer and larger operations.

Queries, keys and values are one product, gate and up another; queries and keys are rotated together by angles from a
table; weights are in the engine's format. Shapes: T tokens, C model width, D head width, A = H + 2 K heads of queries,
keys and values, R = H + K of queries and keys, V vocabulary, S positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.engine.formats import Pack
from powerhouse.models.attention import Attend
from powerhouse.models.decoder import Decoder
from powerhouse.models.layers import Block, RMSNorm, Rope
from powerhouse.models.rope import rope_angles


class FusedDecoder(nn.Module):
    """What a stage computes with. With `empties`, a block of the decoder is let go once its own is made: none is held twice."""

    def __init__(self, decoder: Decoder, pack: Pack, dtype: torch.dtype, num_positions: int, *, empties: bool = False) -> None:
        super().__init__()
        self.config, self.layers = decoder.config, decoder.layers
        self.is_first, self.is_last = decoder.is_first, decoder.is_last
        self.dtype, self.num_positions = dtype, num_positions
        self.blocks = nn.ModuleDict()
        for name, block in list(decoder.model.layers.items()):
            assert isinstance(block, Block), "a decoder is made of blocks"
            self.blocks[name] = FusedBlock(block, pack, dtype)
            if empties:
                del decoder.model.layers[name], block
        if self.is_first:
            self.embed_tokens = decoder.model.embed_tokens
        if self.is_last:
            self.norm = FusedNorm(decoder.model.norm, dtype)
            self.lm_head = pack([decoder.lm_head])
        self.rope_table = self._make_rope_table(num_positions)
        """By position, [S, 1, D] twice."""

    def _make_rope_table(self, num_positions: int) -> Rope:
        positions_S = torch.arange(num_positions, device=next(self.parameters()).device)
        config = self.config
        cos_SD, sin_SD = rope_angles(positions_S, config.head_dim, config.rope_theta, config.rope_scaling)
        return cos_SD.unsqueeze(1).to(self.dtype), sin_SD.unsqueeze(1).to(self.dtype)

    def transform(self, x: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Ids [T] (first slice) or hidden states [T, C] to hidden states [T, C]."""
        x, rope = self.enter(x, positions_T)
        for name, block in self.blocks.items():
            x = block(x, int(name), attend, rope, self.config.window(int(name)))
        return x

    def enter(self, x: Tensor, positions_T: Tensor) -> tuple[Tensor, Rope]:
        """What blocks are given of ids [T] (first slice) or hidden states [T, C]: hidden states and the angles."""
        if self.is_first:
            x = self.embed_tokens(x).to(self.dtype)
        cos_S1D, sin_S1D = self.rope_table
        return x, (cos_S1D[positions_T], sin_S1D[positions_T])

    def project(self, x_TC: Tensor) -> Tensor:
        """The last hidden states to fp32 logits [T, V]."""
        logits_TV: Tensor = self.lm_head(self.norm(x_TC))
        return logits_TV.float()


class FusedNorm(nn.Module):
    """RMSNorm in as few operations as the device has it."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(norm, RMSNorm), "a decoder of llama's kind"
        self.weight_C = nn.Parameter(norm.weight.detach().to(dtype), requires_grad=False)
        self.eps = norm.eps
        self._eps = torch.tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return F.rms_norm(x, self.weight_C.shape, self.weight_C, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * factor).to(x.dtype).mul_(self.weight_C)


class FusedBlock(nn.Module):
    """A block of models/layers.py: attention and gated feed-forward, the norm before each."""

    def __init__(self, block: Block, pack: Pack, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        assert (block.is_pre_norm, mlp.is_gated, attention.shape.is_scaled) == (True,) * 3, "a decoder of llama's kind"
        self.shape = attention.shape
        self.num_rotated = self.shape.num_heads + self.shape.num_kv_heads
        self.input_norm = FusedNorm(block.input_layernorm, dtype)
        self.qkv_proj = pack([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = pack([attention.o_proj])
        self.q_norm = self.k_norm = None
        if self.shape.qk_norm_eps is not None:
            self.q_norm, self.k_norm = FusedNorm(attention.q_norm, dtype), FusedNorm(attention.k_norm, dtype)
        self.mlp_norm = FusedNorm(block.post_attention_layernorm, dtype)
        self.gate_up_proj = pack([mlp.gate_proj, mlp.up_proj])
        self.down_proj = pack([mlp.down_proj])
        self.activation = mlp.activation

    def forward(self, x_TC: Tensor, layer: int, attend: Attend, rope: Rope, window: int | None) -> Tensor:
        return self.finish(x_TC, attend(layer, *self.queries_keys_values(x_TC, rope), window=window))

    def finish(self, x_TC: Tensor, heads_THD: Tensor) -> Tensor:
        """What comes after attention."""
        x_TC = x_TC + self.o_proj(heads_THD.flatten(-2))
        gate, up = self.gate_up_proj(self.mlp_norm(x_TC)).chunk(2, dim=-1)
        out_TC: Tensor = x_TC + self.down_proj(self.activation(gate).mul_(up))
        return out_TC

    def queries_keys_values(self, x_TC: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, (cos_T1D, sin_T1D) = self.shape.num_heads, rope
        qkv_TAD = self.qkv_proj(self.input_norm(x_TC)).view(len(x_TC), -1, self.shape.head_dim)
        qk_TRD = qkv_TAD[:, : self.num_rotated]
        if self.q_norm and self.k_norm:
            qk_TRD = torch.cat([self.q_norm(qk_TRD[:, :num_heads]), self.k_norm(qk_TRD[:, num_heads:])], dim=1)
        swapped_TRD = qk_TRD.roll(self.shape.head_dim // 2, dims=-1)
        qk_TRD = torch.addcmul(qk_TRD * cos_T1D, swapped_TRD, sin_T1D)
        return qk_TRD[:, :num_heads], qk_TRD[:, num_heads:], qkv_TAD[:, self.num_rotated :]
