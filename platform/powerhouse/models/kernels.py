"""Fast kernels of attention, each equal to `dense_attention`; `KERNELS` names them.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads, G = H / K, D head width, C a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from powerhouse.models.attention import Kernel, Mask, PositionBias, RowAttention, dense_attention, distances
from powerhouse.models.halving import can_halve, halved_attention

_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_CHUNK = 512


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None = None) -> Tensor:
    """The fused kernels of torch kernels, and only those: what none of them can do goes to `chunked_attention`.

    No fused kernel takes a group and a mask at once, so a group's heads become more queries of their key/value head.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_plain = bias is None and not mask.differs_by_row and (mask.window is None or mask.window >= num_keys)
    with sdpa_kernel(_FUSED):
        if is_plain and (not mask.is_causal or num_queries == 1):
            return _unfold(F.scaled_dot_product_attention(_fold(q, k), k.transpose(1, 2), v.transpose(1, 2)), q)
        if is_plain and mask.num_past == 0:
            return _causal(q, k, v)
    if q.device.type == "cpu" and bias is not None and torch.is_grad_enabled():
        return chunked_attention(q, k, v, mask, bias)  # the CPU's kernel has no gradient for what is added to the scores
    added = _added(q, k, mask, bias)
    with sdpa_kernel(_FUSED):
        out = F.scaled_dot_product_attention(_fold(q, k), k.transpose(1, 2), v.transpose(1, 2), attn_mask=added)
    return _unfold(out, q)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(num_groups, dim=2) for x in (k, v)) if num_groups > 1 else (k, v)
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape == k.shape and can_halve(q.shape[1]):
        return halved_attention(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def _fold(q_BTHD: Tensor, k_BSKD: Tensor) -> Tensor:
    """[B, K, G * T, D]: the queries of all heads of a group, one head after the other."""
    batch, num_queries, _, width = q_BTHD.shape
    return q_BTHD.view(batch, num_queries, k_BSKD.shape[2], -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(out_BKRD: Tensor, q_BTHD: Tensor) -> Tensor:
    batch, num_queries, num_heads, width = q_BTHD.shape
    return out_BKRD.reshape(batch, num_heads, num_queries, width).transpose(1, 2)


def _added(q: Tensor, k: Tensor, mask: Mask, bias: PositionBias | None) -> Tensor:
    """What is added to the folded scores, -inf where a key is not seen: [B or 1, K or 1, G * T, S]."""
    queries, keys = range(q.shape[1]), range(k.shape[1])
    num_kv_heads, num_groups = k.shape[2], q.shape[2] // k.shape[2]
    is_seen = mask.block(queries, keys, q.device)[:, None]
    if bias is None:
        return (
            torch.zeros(is_seen.shape, dtype=q.dtype, device=q.device)
            .masked_fill(~is_seen, float("-inf"))
            .repeat(1, 1, num_groups, 1)
        )
    added_HTS = bias(distances(mask, queries, keys, q.device)).to(q.dtype)
    added_BHTS = added_HTS.masked_fill(~is_seen, float("-inf"))
    return added_BHTS.view(-1, num_kv_heads, num_groups * len(queries), len(keys))


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None = None) -> Tensor:
    """Flash attention (Dao et al. 2022, algorithm 1) in plain torch: no more than a chunk of scores at a time.

    Memory grows with T + S, also in training, where each chunk of queries is computed again on the way back.
    """
    chunks = [_recomputed(q[:, start : start + _CHUNK], k, v, mask, bias, start) for start in range(0, q.shape[1], _CHUNK)]
    return torch.cat(chunks, dim=1)


def _recomputed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None, start: int) -> Tensor:
    if not torch.is_grad_enabled():
        return _query_chunk(q, k, v, mask, bias, start)
    out: Tensor = checkpoint(_query_chunk, q, k, v, mask, bias, start, use_reentrant=False)
    return out


def _query_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None, start: int) -> Tensor:
    """Attend with the queries from `start` on to all keys they may see, a chunk of keys at a time.

    `top` is the highest score so far, `total` and `out` the sums of exp(score - top) without and with the values.
    """
    queries, num_kv_heads = range(start, start + q.shape[1]), k.shape[2]
    q_BKRD = _fold(q, k).float() / math.sqrt(q.shape[-1])
    top = q_BKRD.new_full((*q_BKRD.shape[:-1], 1), float("-inf"))
    total, out = torch.zeros_like(top), torch.zeros_like(q_BKRD)
    for keys in _key_chunks(mask, queries, k.shape[1]):
        k_BKSD, v_BKSD = (x[:, keys.start : keys.stop].transpose(1, 2).float() for x in (k, v))
        scores = q_BKRD @ k_BKSD.transpose(2, 3)
        by_head = scores.view(len(q), num_kv_heads, -1, len(queries), len(keys))
        if bias is not None:
            added_HCS = bias(distances(mask, queries, keys, q.device))
            by_head += added_HCS.view(num_kv_heads, -1, len(queries), len(keys))
        is_seen = mask.block(queries, keys, q.device)
        if not is_seen.all():
            by_head.masked_fill_(~is_seen[:, None, None], float("-inf"))
        new_top = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        base = new_top.masked_fill(new_top == float("-inf"), 0.0)  # nothing seen yet: exp(-inf - 0) is 0, not nan
        weights, shrink = scores.sub_(base).exp_(), (top - base).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v_BKSD
        top = new_top
    return _unfold(out / total, q).to(q.dtype)


def _key_chunks(mask: Mask, queries: range, num_keys: int) -> Iterator[range]:
    """The chunks of keys that some query of the range can see, by causality and window."""
    first = 0 if mask.window is None else max(0, queries.start + mask.num_past - mask.window + 1)
    last = min(num_keys, queries.stop + mask.num_past) if mask.is_causal else num_keys
    for start in range(first, last, _CHUNK):
        yield range(start, min(start + _CHUNK, last))


def flex_attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None = None) -> Tensor:
    """FlexAttention of torch (Dong et al. 2024): blocks that a document or window mask hides are not computed.

    Compiled on CUDA; elsewhere it runs uncompiled, which is right and slow.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    score_mod = None
    if bias is not None:
        # The bias of every distance there is: a table to look up in, not a function to compile.
        span = torch.arange(1 - num_queries - mask.num_past, num_keys, device=q.device)
        table_HX, offset = bias(span), num_queries + mask.num_past - 1

        def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table_HX[head, key - query - mask.num_past + offset]

    block_mask = _block_mask(mask, num_queries, num_keys, q.device)
    out = _flex(q.device.type)(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod, block_mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    heads: Tensor = out.transpose(1, 2)
    return heads


@functools.lru_cache(maxsize=8)
def _block_mask(mask: Mask, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """Made once for all layers of a pass: a mask is one object there."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.sees(query + mask.num_past, key, row)

    rows = mask.num_rows if mask.differs_by_row else None
    return create_block_mask(mask_mod, rows, None, num_queries, num_keys, device=str(device))


@functools.lru_cache(maxsize=2)
def _flex(device_type: str) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compile(flex_attention) if device_type == "cuda" else flex_attention)


KERNELS: dict[str, Kernel] = {
    "dense": dense_attention,
    "sdpa": sdpa_attention,
    "chunked": chunked_attention,
    "flex": flex_attention_kernel,
}


def document_kernel(device: torch.device) -> Kernel:
    """The kernel for a mask of documents: on a GPU the one that leaves out what the mask hides."""
    return flex_attention_kernel if device.type == "cuda" else sdpa_attention


causal_attention = RowAttention(Mask(), sdpa_attention)
"""Rows from their start, each position after the other: the `Attend` of a decoder's training."""
