"""The parts that the model families share.

Shapes: * any leading axes ([B, T] in training, flat [T] in the engine), C model width, H query heads, K key/value
heads, D head width, F feed-forward width, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.models.attention import Attend, PositionBias
from powerhouse.models.backward import rms_norm, rotate

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, [*, D] each; the sines of the first half are negative."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Linear(nn.Linear):
    """One that is not filled when it is made: weights come from a checkpoint or from `Model.initialise`."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.dtype == self.weight.dtype == torch.float32:
            return rms_norm(x, self.weight, self.eps)
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each head by its position's angles; leading axes pass through."""
    cos, sin = (angles_TD.unsqueeze(-2).to(x_THD.dtype) for angles_TD in (cos_TD, sin_TD))
    if torch.is_grad_enabled() and x_THD.dtype == torch.float32:
        return rotate(x_THD, cos, sin)
    return x_THD * cos + x_THD.roll(x_THD.shape[-1] // 2, dims=-1) * sin


@dataclass(frozen=True)
class AttentionShape:
    """What differs between the families' attention."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm_eps: float | None = None
    """RMSNorm of each query and key head, with this epsilon (Henry et al. 2020)."""
    is_scaled: bool = True
    """Scores divided by sqrt(D); T5 folds the factor into its weights."""


class Attention(nn.Module):
    """Multi-head attention with grouped queries (Ainslie et al. 2023); what is attended to is the `attend` value's business."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = Linear(shape.width, shape.num_heads * shape.head_dim, bias=shape.has_qkv_bias)
        self.k_proj = Linear(shape.width, kv_width, bias=shape.has_qkv_bias)
        self.v_proj = Linear(shape.width, kv_width, bias=shape.has_qkv_bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, shape.width, bias=shape.has_output_bias)
        if shape.qk_norm_eps is not None:
            self.q_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps)

    def forward(
        self,
        x: Tensor,
        layer: int,
        attend: Attend,
        rope: Rope | None = None,
        window: int | None = None,
        bias: PositionBias | None = None,
    ) -> Tensor:
        q, (k, v) = self.queries(x), self.keys_values(x)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return self.output(attend(layer, q, k, v, window=window, bias=bias))

    def queries(self, x: Tensor) -> Tensor:
        """[*, H, D], normed and with the families' scale, before rotation."""
        q: Tensor = self.q_proj(x).unflatten(-1, (-1, self.shape.head_dim))
        q = self.q_norm(q) if self.shape.qk_norm_eps is not None else q
        return q if self.shape.is_scaled else q * math.sqrt(self.shape.head_dim)  # `attend` divides by it

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[*, K, D] each, keys before rotation."""
        k, v = (projection(x).unflatten(-1, (-1, self.shape.head_dim)) for projection in (self.k_proj, self.v_proj))
        return self.k_norm(k) if self.shape.qk_norm_eps is not None else k, v

    def output(self, heads: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(heads.flatten(-2))
        return projected


class FeedForward(nn.Module):
    """down(act(up(x))), or, gated, down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, activation: str, *, is_gated: bool, has_bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.is_gated = is_gated
        if is_gated:
            self.gate_proj = Linear(width, hidden, bias=has_bias)
        self.up_proj = Linear(width, hidden, bias=has_bias)
        self.down_proj = Linear(hidden, width, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.gate_proj(x)) * self.up_proj(x) if self.is_gated else self.activation(self.up_proj(x))
        out: Tensor = self.down_proj(hidden)
        return out


class Memory:
    """What a decoder's cross-attention looks at: an encoder's states [B, S, C], and `attend` over the valid ones."""

    def __init__(self, states_BSC: Tensor, attend: Attend) -> None:
        self.attend = attend
        self._states_BSC = states_BSC
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def keys_values(self, layer: int, attention: Attention) -> tuple[Tensor, Tensor]:
        """A layer's [B, S, K, D] each: computed once for a whole decoding; with gradients, where the layer runs."""
        if torch.is_grad_enabled():
            return attention.keys_values(self._states_BSC)
        if layer not in self._known:
            self._known[layer] = attention.keys_values(self._states_BSC)
        return self._known[layer]


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, and feed-forward, each with its residual and its norm.

    The norm stands before the part (Xiong et al. 2020) or after the sum (Vaswani et al. 2017).
    """

    def __init__(
        self,
        shape: AttentionShape,
        mlp: FeedForward,
        norm: Callable[[], nn.Module],
        *,
        is_pre_norm: bool = True,
        has_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.is_pre_norm = is_pre_norm
        self.input_layernorm = norm()
        self.self_attn = Attention(shape)
        if has_cross_attention:
            self.cross_attn_layernorm = norm()
            self.cross_attn = Attention(shape)
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        layer: int,
        attend: Attend,
        *,
        rope: Rope | None = None,
        window: int | None = None,
        bias: PositionBias | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        x = self._add(x, self.input_layernorm, lambda y: self.self_attn(y, layer, attend, rope, window, bias))
        if memory is not None:
            x = self._add(x, self.cross_attn_layernorm, lambda y: self._look(y, layer, memory))
        return self._add(x, self.post_attention_layernorm, self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = x + part(norm(x)) if self.is_pre_norm else norm(x + part(x))
        return out

    def _look(self, x: Tensor, layer: int, memory: Memory) -> Tensor:
        k, v = memory.keys_values(layer, self.cross_attn)
        return self.cross_attn.output(memory.attend(layer, self.cross_attn.queries(x), k, v))


class RelativeBias(nn.Module):
    """T5's learned bias by bucket of distance and head (Raffel et al. 2020, section 2.1)."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.is_causal = num_buckets, max_distance, is_causal
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def forward(self, distance: Tensor) -> Tensor:
        """Distances (key minus query) [*] to biases [H, *]."""
        return F.embedding(self.bucket(distance), self.weight).movedim(-1, 0)

    def bucket(self, distance: Tensor) -> Tensor:
        """Half of the buckets hold one distance each, the others grow as its logarithm up to `max_distance`."""
        num_buckets, offset = self.num_buckets, torch.zeros_like(distance)
        if self.is_causal:
            length = (-distance).clamp(min=0)
        else:
            num_buckets //= 2
            offset, length = (distance > 0).long() * num_buckets, distance.abs()
        num_exact = num_buckets // 2
        ratio = torch.log(length.clamp(min=1).float() / num_exact) / math.log(self.max_distance / num_exact)
        far = (num_exact + (ratio * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
        return offset + torch.where(length < num_exact, length, far)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed position encodings (Vaswani et al. 2017, section 3.5), all sines before all cosines: [*, C], fp32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions[..., None].double() / 10_000.0**exponents
    return torch.cat([angles.sin(), angles.cos()[..., : width // 2]], dim=-1).float()
