"""Attention over a paged KV cache (Kwon et al. 2023, section 4.1), in plain torch.

Shapes: T tokens of the batch, B sequences that attend together, Q queries of each, S keys (whole blocks), L layers of this
stage, N blocks, P tokens in a block, H query heads, K key/value heads, D head width, M blocks that are read, R decodes that
attend in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from powerhouse.device import upload
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.kernels import Places, Reach, attend_in_place, can_attend_in_place, choose_kernel
from powerhouse.models.attention import Mask, PositionBias
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.kernels import sdpa_attention

_SPLIT_TOKENS = 512
"""Padding that is worth another group: what a group costs beside its tokens, in tokens (two CPU cores)."""
_SPLIT_DECODES = 4096
"""The same of decodes that attend in place, whose padding costs no more than a softmax."""


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
        pages_dtype: torch.dtype | None = None,
    ) -> None:
        """For activations of `dtype`; pages are of the same unless it is told."""
        shape = (len(layers), config.num_key_value_heads, num_blocks, block_size, config.head_dim)
        self.first_layer = layers.start
        self.num_kv_heads = config.num_key_value_heads
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.block_size = block_size
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.kernel = choose_kernel(device, dtype, *self.heads, config.head_dim)
        self.dtype, pages_dtype = dtype, pages_dtype or dtype
        self.can_attend_in_place = can_attend_in_place(device, pages_dtype, *self.heads, config.head_dim)
        self.k_LKNPD = torch.zeros(shape, dtype=pages_dtype, device=device)
        self.v_LKNPD = torch.zeros(shape, dtype=pages_dtype, device=device)
        self._pages = [(k.flatten(1, 2), v.flatten(1, 2)) for k, v in zip(self.k_LKNPD, self.v_LKNPD, strict=True)]

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Put each token's key and value into its slot, and return them as they are there."""
        k_TKD, v_TKD = (new_TKD.to(self.k_LKNPD.dtype) for new_TKD in (k_TKD, v_TKD))
        for pages_KND, new_TKD in zip(self.pages(layer), (k_TKD, v_TKD), strict=True):
            pages_KND.index_copy_(1, slots_T, new_TKD.transpose(0, 1))
        return k_TKD.to(self.dtype), v_TKD.to(self.dtype)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values where they lie, slot by slot: [K, N x P, D] twice."""
        return self._pages[layer - self.first_layer]

    def read(self, layer: int, blocks_M: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """The keys and values of blocks of B sequences, equally many each: [K, B, S, D] twice."""
        k, v = (
            pages_LKNPD[layer - self.first_layer].flatten(2).index_select(1, blocks_M).to(self.dtype)
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


@dataclass(frozen=True)
class _Decodes:
    """Those of about as many keys, which attend in place; `rows_R` is None where they are the whole batch."""

    rows_R: Tensor | None
    tables_RM: Tensor
    positions_R: Tensor

    @classmethod
    def of(cls, batch: ForwardBatch, spans: Sequence[range], members: Sequence[int], cache: PagedCache) -> _Decodes:
        num_blocks = max(len(batch.block_tables[i]) for i in members)
        tables = [pad(batch.block_tables[i], num_blocks) for i in members]
        rows_R = _indices([spans[i].start for i in members], cache)
        positions_R = _indices(batch.positions, cache)[rows_R]
        return cls(None if len(members) == len(spans) else rows_R, _indices(tables, cache), positions_R)

    def places(self, window: int | None, cache: PagedCache) -> Places:
        num_slots = cache.pages(cache.first_layer)[0].shape[1]
        return Places.find(self.tables_RM, self.positions_R, window, cache.block_size, cache.heads, num_slots)


class PagedAttention:
    """The `Attend` of one batch: writes the new keys and values into their blocks, then attends over each whole context.

    A prompt from its start attends to itself, without the cache. Decodes attend in place where the device can. The others, and
    they where it cannot, have what they attend to read out of the pages, sequences of equally many queries together. Either way
    one call is for all, or a few where contexts differ so much that padding would cost more. What differs per batch and not per
    layer is made once, here.
    """

    def __init__(self, cache: PagedCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._slots_T = _indices(batch.slots, cache)
        starts = [0, *accumulate(batch.query_lengths)]
        spans = [range(start, stop) for start, stop in pairwise(starts)]
        is_fresh = [len(span) > 1 and batch.positions[span.start] == 0 for span in spans]
        self._prompts = [span for span, fresh in zip(spans, is_fresh, strict=True) if fresh]
        others = [i for i, fresh in enumerate(is_fresh) if not fresh]
        decodes = [i for i in others if cache.can_attend_in_place and len(spans[i]) == 1]
        lengths = [(len(batch.block_tables[i]), i) for i in decodes]
        alike = _split(lengths, cache.block_size, _SPLIT_DECODES)
        self._decodes = [_Decodes.of(batch, spans, members, cache) for members in alike]
        self._groups = list(_groups(batch, spans, sorted({*others} - {*decodes}), cache))
        self._places: dict[int | None, list[Places]] = {}  # by window
        self._reaches: dict[int | None, list[Reach]] = {}

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
            self._places[window] = [decodes.places(window, self._cache) for decodes in self._decodes]
        k_TKD, v_TKD = self._cache.write(layer, self._slots_T, k_TKD, v_TKD)
        k_KND, v_KND = self._cache.pages(layer)
        if self._decodes and self._decodes[0].rows_R is None:
            return attend_in_place(q_THD, k_KND, v_KND, self._places[window][0])
        if len(self._groups) == 1 and self._groups[0].rows_T is None:
            return self._attend(layer, q_THD, self._groups[0], self._reaches[window][0])
        out_THD = torch.empty_like(q_THD)
        for decodes, places in zip(self._decodes, self._places[window], strict=True):
            assert decodes.rows_R is not None, "decodes that are the whole batch are the only ones"
            out_RHD = attend_in_place(q_THD.index_select(0, decodes.rows_R), k_KND, v_KND, places)
            out_THD.index_copy_(0, decodes.rows_R, out_RHD)
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
        return Reach(group.positions_BQ, num_keys, window, self._cache.num_groups, self._cache.dtype)


def _groups(batch: ForwardBatch, spans: Sequence[range], members: Sequence[int], cache: PagedCache) -> Iterator[_Group]:
    by_queries = defaultdict(list)
    for i in members:
        by_queries[len(spans[i])].append(i)
    positions_T = _indices(batch.positions, cache)
    for sequences in by_queries.values():
        for similar in _split([(len(batch.block_tables[i]), i) for i in sequences], cache.block_size, _SPLIT_TOKENS):
            rows_BQ = _indices([list(spans[i]) for i in similar], cache)
            num_blocks = max(len(batch.block_tables[i]) for i in similar)
            blocks_M = _indices([block for i in similar for block in pad(batch.block_tables[i], num_blocks)], cache)
            is_all = similar == list(range(len(spans)))
            yield _Group(None if is_all else rows_BQ.flatten(), blocks_M, positions_T[rows_BQ])


def _split(lengths: Sequence[tuple[int, int]], block_size: int, most: int) -> list[list[int]]:
    """Sequences, given with their number of blocks, in groups: a new one where it spares more than `most` tokens of padding."""
    ordered = sorted(lengths, reverse=True)
    groups: list[list[int]] = []
    longest = 0
    for place, (num_blocks, i) in enumerate(ordered):
        if not groups or (longest - num_blocks) * (len(ordered) - place) * block_size > most:
            groups.append([])
            longest = num_blocks
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def pad(blocks: tuple[int, ...], num_blocks: int) -> list[int]:
    """A block table as long as another: what is beyond a context is never looked at."""
    return [*blocks, *[0] * (num_blocks - len(blocks))]


def _indices(values: object, cache: PagedCache) -> Tensor:
    return upload(values, cache.k_LKNPD.device, torch.long)
