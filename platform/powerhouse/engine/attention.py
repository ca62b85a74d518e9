"""Attention over a paged KV cache (Kwon et al. 2023, section 4.1), in plain torch.

Shapes: T tokens of the batch, B sequences that attend together, Q queries of each, S keys (whole blocks), L layers of this
stage, N blocks, P tokens in a block, H query heads, K key/value heads, D head width, M blocks that are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.kernels import Reach, choose_kernel
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
        self.kernel = choose_kernel(device, dtype, config.num_attention_heads, self.num_kv_heads, config.head_dim)
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
        self._reaches: dict[int | None, list[Reach]] = {}  # by window

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
        if window not in self._reaches:
            self._reaches[window] = [self._reach(group, window) for group in self._groups]
        self._cache.write(layer, self._slots_T, k_TKD, v_TKD)
        if len(self._groups) == 1 and self._groups[0].rows_T is None:
            return self._attend(layer, q_THD, self._groups[0], self._reaches[window][0])
        out_THD = torch.empty_like(q_THD)
        for span in self._prompts:
            q, k, v = (x[None, span.start : span.stop] for x in (q_THD, k_TKD, v_TKD))
            out_THD[span.start : span.stop] = sdpa_attention(q, k, v, Mask(window=window))[0]
        for group, reach in zip(self._groups, self._reaches[window], strict=True):
            assert group.rows_T is not None, "a group that is the whole batch is the only one"
            out_THD.index_copy_(0, group.rows_T, self._attend(layer, q_THD.index_select(0, group.rows_T), group, reach))
        return out_THD

    def _attend(self, layer: int, q_THD: Tensor, group: _Group, reach: Reach) -> Tensor:
        k_KBSD, v_KBSD = self._cache.read(layer, group.blocks_M, len(group.positions_BQ))
        q_BQHD = q_THD.view(*group.positions_BQ.shape, *q_THD.shape[1:])
        return self._cache.kernel(q_BQHD, k_KBSD, v_KBSD, reach).flatten(0, 1)

    def _reach(self, group: _Group, window: int | None) -> Reach:
        num_keys = len(group.blocks_M) // len(group.positions_BQ) * self._cache.block_size
        return Reach(group.positions_BQ, num_keys, window, self._cache.num_groups, self._cache.k_LKNPD.dtype)


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


def _pad(blocks: tuple[int, ...], num_blocks: int) -> list[int]:
    return [*blocks, *[0] * (num_blocks - len(blocks))]


def _indices(values: object, cache: PagedCache) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=cache.k_LKNPD.device)
