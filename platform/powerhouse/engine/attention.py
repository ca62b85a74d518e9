"""Attention over a paged KV cache (Kwon et al. 2023, section 4.1), in plain torch.

Shapes: T tokens of the batch, B sequences that attend together, Q queries of each, S keys (whole blocks), L layers of this
stage, N blocks, P tokens in a block, H query heads, K key/value heads, D head width, R = Q x H / K query rows per key/value
head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from powerhouse.engine.batch import ForwardBatch
from powerhouse.models.attention import PositionBias
from powerhouse.models.decoder import DecoderConfig


class PagedCache:
    """Keys and values of a stage's layers. Zeros at first: what a mask hides must still be finite."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: range,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (len(layers), num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.first_layer = layers.start
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.block_size = block_size
        self.k_LNPKD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LNPKD = torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many queries."""

    rows_BQ: Tensor
    table_BN: Tensor
    positions_BQ: Tensor


class PagedAttention:
    """The `Attend` of one batch: writes the new keys and values into their blocks, then attends over each whole context.

    Sequences with as many queries attend together, so all decodes are one call. What differs per batch and not per layer
    is made once, here.
    """

    def __init__(self, cache: PagedCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._slots_T = _indices(batch.slots, cache)
        self._groups = _group(batch, cache)
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
        k_NPKD, v_NPKD = (pages[layer - self._cache.first_layer] for pages in (self._cache.k_LNPKD, self._cache.v_LNPKD))
        k_NPKD.flatten(0, 1).index_copy_(0, self._slots_T, k_TKD)
        v_NPKD.flatten(0, 1).index_copy_(0, self._slots_T, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for group, bias_B1RS in zip(self._groups, self._biases[window], strict=True):
            k_BSKD, v_BSKD = (pages[group.table_BN].flatten(1, 2) for pages in (k_NPKD, v_NPKD))
            out_THD[group.rows_BQ] = grouped_attention(q_THD[group.rows_BQ], k_BSKD, v_BSKD, bias_B1RS)
        return out_THD


def grouped_attention(q_BQHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, bias_B1RS: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V; query heads of one key/value head are rows of one attention, so none is copied."""
    batch, num_queries, num_heads, width = q_BQHD.shape
    num_kv_heads = k_BSKD.shape[2]
    q_BKRD = q_BQHD.view(batch, num_queries, num_kv_heads, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BKSD, v_BKSD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    out_BKRD = F.scaled_dot_product_attention(q_BKRD, k_BKSD, v_BKSD, attn_mask=bias_B1RS)
    return out_BKRD.view(batch, num_heads, num_queries, width).transpose(1, 2)


def _group(batch: ForwardBatch, cache: PagedCache) -> list[_Group]:
    members = defaultdict(list)
    starts = [0, *accumulate(batch.query_lengths)]
    for sequence, num_queries in enumerate(batch.query_lengths):
        members[num_queries].append(sequence)
    positions_T = _indices(batch.positions, cache)
    groups = []
    for num_queries, sequences in members.items():
        rows_BQ = _indices([list(range(starts[i], starts[i] + num_queries)) for i in sequences], cache)
        num_blocks = max(len(batch.block_tables[i]) for i in sequences)
        table_BN = _indices([_pad(batch.block_tables[i], num_blocks) for i in sequences], cache)
        groups.append(_Group(rows_BQ, table_BN, positions_T[rows_BQ]))
    return groups


def _bias(group: _Group, window: int | None, cache: PagedCache) -> Tensor:
    """0 where a query may look, -inf where not [B, 1, R, S]: keys at its position and before, which hides padding too."""
    keys_S = torch.arange(group.table_BN.shape[1] * cache.block_size, device=group.positions_BQ.device)
    distance_BQS = group.positions_BQ.unsqueeze(-1) - keys_S
    is_hidden_BQS = distance_BQS < 0 if window is None else (distance_BQS < 0) | (distance_BQS >= window)
    bias_BQS = torch.zeros(distance_BQS.shape, dtype=cache.k_LNPKD.dtype, device=keys_S.device)
    return bias_BQS.masked_fill(is_hidden_BQS, float("-inf")).repeat(1, cache.num_groups, 1).unsqueeze(1)


def _pad(blocks: tuple[int, ...], num_blocks: int) -> list[int]:
    return [*blocks, *[0] * (num_blocks - len(blocks))]


def _indices(values: object, cache: PagedCache) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=cache.k_LNPKD.device)
