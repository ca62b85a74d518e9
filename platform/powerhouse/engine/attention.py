"""Attention over a paged KV cache (Kwon et al. 2023, section 4.1), in plain torch.

Shapes: T tokens of the batch, B sequences that attend together, Q queries of each, S keys (whole blocks), L layers of this
stage, N blocks, P tokens in a block, H query heads, K key/value heads, D head width, G = H / K, R = Q x G query rows per
key/value head, M blocks that are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from powerhouse.engine.batch import ForwardBatch
from powerhouse.models.attention import Mask, PositionBias
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.kernels import sdpa_attention

_SPLIT_TOKENS = 512
"""Padding that is worth another group: what a group costs beside its tokens, in tokens (two CPU cores)."""


class PagedCache:
    """Keys and values of a stage's layers. Zeros at first: what a mask hides must still be finite.

    Heads stand before blocks, so blocks that are read one after the other are a matrix per head, without another copy.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: range,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (len(layers), config.num_key_value_heads, num_blocks, block_size, config.head_dim)
        self.first_layer = layers.start
        self.num_kv_heads = config.num_key_value_heads
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.block_size = block_size
        self.k_LKNPD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LKNPD = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Put each token's key and value into its slot."""
        for pages_LKNPD, new_TKD in ((self.k_LKNPD, k_TKD), (self.v_LKNPD, v_TKD)):
            pages_LKNPD[layer - self.first_layer].flatten(1, 2).index_copy_(1, slots_T, new_TKD.transpose(0, 1))

    def read(self, layer: int, blocks_M: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """The keys and values of blocks of B sequences, equally many each: [K, B, S, D] twice."""
        k, v = (
            pages_LKNPD[layer - self.first_layer].flatten(2).index_select(1, blocks_M)
            for pages_LKNPD in (self.k_LKNPD, self.v_LKNPD)
        )
        shape = (self.num_kv_heads, num_sequences, -1, self.k_LKNPD.shape[-1])
        return k.view(shape), v.view(shape)


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many queries and about as many keys; `rows_T` is None where they are the whole batch in order."""

    rows_T: Tensor | None
    blocks_M: Tensor
    positions_BQ: Tensor


class PagedAttention:
    """The `Attend` of one batch: writes the new keys and values into their blocks, then attends over each whole context.

    A prompt from its start attends to itself, without the cache. The others go by groups, so all decodes are one call, or a
    few where contexts differ so much that padding would cost more. What differs per batch and not per layer is made once,
    here.
    """

    def __init__(self, cache: PagedCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._slots_T = _indices(batch.slots, cache)
        starts = [0, *accumulate(batch.query_lengths)]
        spans = [range(start, stop) for start, stop in pairwise(starts)]
        is_fresh = [len(span) > 1 and batch.positions[span.start] == 0 for span in spans]
        self._prompts = [span for span, fresh in zip(spans, is_fresh, strict=True) if fresh]
        self._groups = list(_groups(batch, spans, [i for i, fresh in enumerate(is_fresh) if not fresh], cache))
        self._biases: dict[int | None, list[Tensor]] = {}  # by window

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        /,
        *,
        window: int | None = None,
        bias: PositionBias | None = None,
    ) -> Tensor:
        assert bias is None, "no decoder that pages its cache has a position bias"
        if window not in self._biases:
            self._biases[window] = [_bias(group, window, self._cache) for group in self._groups]
        self._cache.write(layer, self._slots_T, k_TKD, v_TKD)
        if len(self._groups) == 1 and self._groups[0].rows_T is None:
            return self._attend(layer, q_THD, self._groups[0], self._biases[window][0])
        out_THD = torch.empty_like(q_THD)
        for span in self._prompts:
            q, k, v = (x[None, span.start : span.stop] for x in (q_THD, k_TKD, v_TKD))
            out_THD[span.start : span.stop] = sdpa_attention(q, k, v, Mask(window=window))[0]
        for group, bias_B1RS in zip(self._groups, self._biases[window], strict=True):
            assert group.rows_T is not None, "a group that is the whole batch is the only one"
            out_THD.index_copy_(0, group.rows_T, self._attend(layer, q_THD.index_select(0, group.rows_T), group, bias_B1RS))
        return out_THD

    def _attend(self, layer: int, q_THD: Tensor, group: _Group, bias_B1RS: Tensor) -> Tensor:
        k_KBSD, v_KBSD = self._cache.read(layer, group.blocks_M, len(group.positions_BQ))
        q_BQHD = q_THD.view(*group.positions_BQ.shape, *q_THD.shape[1:])
        attend = decode_attention if q_BQHD.shape[1] == 1 else grouped_attention
        return attend(q_BQHD, k_KBSD, v_KBSD, bias_B1RS).flatten(0, 1)


def grouped_attention(q_BQHD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, bias_B1RS: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V; query heads of one key/value head are rows of one attention, so none is copied."""
    batch, num_queries, num_heads, width = q_BQHD.shape
    q_BKRD = q_BQHD.view(batch, num_queries, len(k_KBSD), -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BKSD, v_BKSD = k_KBSD.transpose(0, 1), v_KBSD.transpose(0, 1)
    out_BKRD = F.scaled_dot_product_attention(q_BKRD, k_BKSD, v_BKSD, attn_mask=bias_B1RS)
    return out_BKRD.reshape(batch, num_heads, num_queries, width).transpose(1, 2)


def decode_attention(q_B1HD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, bias_B1GS: Tensor) -> Tensor:
    """The same for one query of each sequence, as two products of many small matrices: faster there than the fused kernel."""
    num_kv_heads, batch, _, width = k_KBSD.shape
    q_KBGD = q_B1HD.view(batch, num_kv_heads, -1, width).transpose(0, 1)
    scores_KBGS = torch.matmul(q_KBGD, k_KBSD.transpose(2, 3)).mul_(width**-0.5).add_(bias_B1GS[:, 0])
    out_KBGD = torch.matmul(scores_KBGS.softmax(-1), v_KBSD)
    return out_KBGD.transpose(0, 1).reshape(batch, 1, -1, width)


def _groups(batch: ForwardBatch, spans: Sequence[range], members: Sequence[int], cache: PagedCache) -> Iterator[_Group]:
    by_queries = defaultdict(list)
    for i in members:
        by_queries[len(spans[i])].append(i)
    positions_T = _indices(batch.positions, cache)
    for sequences in by_queries.values():
        for similar in _split([(len(batch.block_tables[i]), i) for i in sequences], cache.block_size):
            rows_BQ = _indices([list(spans[i]) for i in similar], cache)
            num_blocks = max(len(batch.block_tables[i]) for i in similar)
            blocks_M = _indices([block for i in similar for block in _pad(batch.block_tables[i], num_blocks)], cache)
            is_all = similar == list(range(len(spans)))
            yield _Group(None if is_all else rows_BQ.flatten(), blocks_M, positions_T[rows_BQ])


def _split(lengths: Sequence[tuple[int, int]], block_size: int) -> list[list[int]]:
    """Sequences, given with their number of blocks, in groups: a new one where it spares more padding than a group costs."""
    ordered = sorted(lengths, reverse=True)
    groups: list[list[int]] = []
    longest = 0
    for place, (num_blocks, i) in enumerate(ordered):
        if not groups or (longest - num_blocks) * (len(ordered) - place) * block_size > _SPLIT_TOKENS:
            groups.append([])
            longest = num_blocks
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def _bias(group: _Group, window: int | None, cache: PagedCache) -> Tensor:
    """0 where a query may look, -inf where not [B, 1, R, S]: keys at its position and before, which hides padding too."""
    batch = len(group.positions_BQ)
    keys_S = torch.arange(len(group.blocks_M) // batch * cache.block_size, device=group.positions_BQ.device)
    distance_BQS = group.positions_BQ.unsqueeze(-1) - keys_S
    is_hidden_BQS = distance_BQS < 0 if window is None else (distance_BQS < 0) | (distance_BQS >= window)
    bias_BQS = torch.zeros(distance_BQS.shape, dtype=cache.k_LKNPD.dtype, device=keys_S.device)
    return bias_BQS.masked_fill(is_hidden_BQS, float("-inf")).repeat(1, cache.num_groups, 1).unsqueeze(1)


def _pad(blocks: tuple[int, ...], num_blocks: int) -> list[int]:
    return [*blocks, *[0] * (num_blocks - len(blocks))]


def _indices(values: object, cache: PagedCache) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=cache.k_LKNPD.device)
