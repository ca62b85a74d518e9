"""How queries attend to keys in pages: a group of sequences to keys that were read out of them, or each to where they lie.

Shapes: B sequences, Q queries of each, S keys of the longest, H query heads, K key/value heads, D head width, R = Q x H / K
query rows per key/value head. The queries of a sequence are the last Q of its context. In place: T queries of any sequences, M
blocks of the longest context, P tokens in a block, N slots of a head's pages, J keys of all queries and heads together.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from powerhouse.models.attention import Mask, dense_attention

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reach:
    """What each query sees: keys at its position and before, `window` of them if there is one. That hides padding too."""

    positions_BQ: Tensor
    num_keys: int
    window: int | None
    num_groups: int
    """H / K."""
    dtype: torch.dtype

    @cached_property
    def bias_B1RS(self) -> Tensor:
        """0 where a query may look, -inf where not."""
        keys_S = torch.arange(self.num_keys, device=self.positions_BQ.device)
        distance_BQS = self.positions_BQ.unsqueeze(-1) - keys_S
        is_hidden_BQS = distance_BQS < 0
        if self.window is not None:
            is_hidden_BQS |= distance_BQS >= self.window
        bias_BQS = torch.zeros(distance_BQS.shape, dtype=self.dtype, device=keys_S.device)
        return bias_BQS.masked_fill(is_hidden_BQS, float("-inf")).repeat(1, self.num_groups, 1).unsqueeze(1)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """For rows end to end: where each sequence's queries and keys begin [B + 1] and how many of its keys count [B]."""
        batch, num_queries = self.positions_BQ.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.positions_BQ.device)
        return starts * num_queries, starts * self.num_keys, (self.positions_BQ[:, -1] + 1).int()


GroupKernel = Callable[[Tensor, Tensor, Tensor, Reach], Tensor]
"""(q_BQHD, k_KBSD, v_KBSD, reach) -> o_BQHD."""


def sdpa(q_BQHD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, reach: Reach) -> Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V; query heads of one key/value head are rows of one attention, so none is copied."""
    batch, num_queries, num_heads, width = q_BQHD.shape
    q_BKRD = q_BQHD.view(batch, num_queries, len(k_KBSD), -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BKSD, v_BKSD = k_KBSD.transpose(0, 1), v_KBSD.transpose(0, 1)
    out_BKRD = F.scaled_dot_product_attention(q_BKRD, k_BKSD, v_BKSD, attn_mask=reach.bias_B1RS)
    return out_BKRD.reshape(batch, num_heads, num_queries, width).transpose(1, 2)


def products(q_BQHD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, reach: Reach) -> Tensor:
    """For one query of each sequence, two products of many small matrices: on a CPU faster than the fused kernel."""
    if q_BQHD.shape[1] > 1:
        return sdpa(q_BQHD, k_KBSD, v_KBSD, reach)
    num_kv_heads, batch, _, width = k_KBSD.shape
    q_KBGD = q_BQHD.view(batch, num_kv_heads, -1, width).transpose(0, 1)
    scores_KBGS = torch.matmul(q_KBGD, k_KBSD.transpose(2, 3)).mul_(width**-0.5).add_(reach.bias_B1RS[:, 0])
    out_KBGD = torch.matmul(scores_KBGS.softmax(-1), v_KBSD)
    return out_KBGD.transpose(0, 1).reshape(batch, 1, -1, width)


def flash(q_BQHD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, reach: Reach) -> Tensor:
    """FlashAttention-2 over rows end to end (Dao 2023), as torch 2.11 carries it; a CPU has no such kernel."""
    query_starts, key_starts, num_used_B = reach.ends
    k, v = (x.permute(1, 2, 0, 3).flatten(0, 1) for x in (k_KBSD, v_KBSD))
    left = None if reach.window is None else reach.window - 1
    out = torch.ops.aten._flash_attention_forward(
        q_BQHD.flatten(0, 1), k, v, query_starts, key_starts, q_BQHD.shape[1], reach.num_keys, 0.0, True, False,
        window_size_left=left, window_size_right=None if left is None else 0, seqused_k=num_used_B,
    )  # fmt: skip
    heads: Tensor = out[0].view_as(q_BQHD)
    return heads


@dataclass(frozen=True)
class Places:
    """Where the keys of each query's heads lie: the nonzero places of a sparse matrix [T x H, K x N]."""

    scores: Tensor
    """The matrix; its values [J] are those of the last layer."""
    padded: Tensor
    """[T x H, S] for a softmax of rows; -inf where a query sees fewer keys than another."""
    filled_J: Tensor | None
    """Of the padded places those that are keys; None is all."""

    @classmethod
    def find(
        cls, tables_TM: Tensor, positions_T: Tensor, window: int | None, block_size: int, heads: tuple[int, int], num_slots: int
    ) -> Places:
        """Of queries with these blocks and positions; `heads` is H and K, `num_slots` N."""
        num_heads, num_kv_heads = heads
        longest = int(positions_T.max()) + 1
        keys_S = torch.arange(longest)
        slots_TS = tables_TM[:, keys_S // block_size] * block_size + keys_S % block_size
        is_seen_TS = keys_S <= positions_T[:, None]
        if window is not None:
            is_seen_TS &= keys_S > positions_T[:, None] - window
        shape = (len(tables_TM), num_heads, longest)
        filled_J = is_seen_TS[:, None].expand(shape).reshape(-1).nonzero().squeeze(1)
        slots_J = (slots_TS[:, None] + first_slots(heads, num_slots)).view(-1)[filled_J].int()
        starts = is_seen_TS.sum(1).repeat_interleave(num_heads).cumsum(0)
        size = (shape[0] * num_heads, num_kv_heads * num_slots)
        scores = torch.sparse_csr_tensor(
            torch.cat([starts.new_zeros(1), starts]).int(), slots_J, torch.zeros(len(slots_J)), size=size
        )
        padded = torch.full((size[0], longest), float("-inf"))
        return cls(scores, padded, None if len(filled_J) == padded.numel() else filled_J)


def first_slots(heads: tuple[int, int], num_slots: int) -> Tensor:
    """Where the pages of each query head's key/value head begin, all of them end to end: [H, 1]."""
    num_heads, num_kv_heads = heads
    return (torch.arange(num_heads) // (num_heads // num_kv_heads) * num_slots)[:, None]


def attend_in_place(q_THD: Tensor, k_KND: Tensor, v_KND: Tensor, places: Places) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V without a copy of keys or values: half the time of `products` and of what they are given.

    Scores are the product of Q and K where the matrix has places; the output is a weighted sum of rows of a table, as bags of
    embeddings are.
    """
    num_queries, num_heads, width = q_THD.shape
    scores, k_SD, v_SD = places.scores, k_KND.flatten(0, 1), v_KND.flatten(0, 1)
    q_RD = q_THD.reshape(-1, width)
    torch.sparse.sampled_addmm(scores, q_RD, k_SD.t(), beta=0.0, alpha=width**-0.5, out=scores)
    if places.filled_J is None:
        weights_J = scores.values().view_as(places.padded).softmax(-1).view(-1)
    else:
        places.padded.view(-1).index_copy_(0, places.filled_J, scores.values())
        weights_J = places.padded.softmax(-1).view(-1).index_select(0, places.filled_J)
    starts, slots_J = scores.crow_indices(), scores.col_indices()
    out_RD = torch.embedding_bag(v_SD, slots_J, starts, False, 0, False, weights_J, True)[0]
    return out_RD.view(num_queries, num_heads, width)


def _in_place(q_BQHD: Tensor, k_KBSD: Tensor, v_KBSD: Tensor, reach: Reach) -> Tensor:
    """The same as a kernel of groups, whose keys and values are pages of one token."""
    batch, num_queries, num_heads, _ = q_BQHD.shape
    tables_BS = torch.arange(batch * reach.num_keys).view(batch, -1)
    tables_TS = tables_BS.repeat_interleave(num_queries, 0)
    heads, num_slots = (num_heads, len(k_KBSD)), batch * reach.num_keys
    places = Places.find(tables_TS, reach.positions_BQ.flatten(), reach.window, 1, heads, num_slots)
    k_KND, v_KND = k_KBSD.flatten(1, 2), v_KBSD.flatten(1, 2)
    return attend_in_place(q_BQHD.flatten(0, 1), k_KND, v_KND, places).view_as(q_BQHD)


CANDIDATES: dict[str, dict[str, GroupKernel]] = {
    "cpu": {"products": products, "sdpa": sdpa},
    "cuda": {"flash": flash, "sdpa": sdpa},
}


def choose_kernel(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, width: int) -> GroupKernel:
    """The first candidate of the device that gives what dense attention gives, for these heads; it is logged."""
    for name, kernel in CANDIDATES[device.type].items():
        fault = _fault(kernel, device, dtype, (num_heads, num_kv_heads, width))
        if fault is None:
            _LOG.info("attention over pages: %s", name)
            return kernel
        _LOG.warning("attention over pages: not %s: %s", name, fault)
    raise AssertionError("the plainest kernel is wrong here")


def can_attend_in_place(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, width: int) -> bool:
    """Whether `attend_in_place` gives what dense attention gives here; it is for float32 on CPUs where torch has MKL."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells once that its sparse matrices may change
        fault = _fault(_in_place, device, dtype, (num_heads, num_kv_heads, width))
    if fault is None:
        _LOG.info("decodes attend to pages in place")
    else:
        _LOG.warning("decodes do not attend to pages in place: %s", fault)
    return fault is None


@torch.inference_mode()
def _fault(kernel: GroupKernel, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> str | None:
    """What is wrong with a kernel, tried on three contexts with and without a window, in decoding and in a chunk."""
    num_heads, num_kv_heads, width = heads
    generator = torch.Generator().manual_seed(0)
    lengths, num_keys = (5, 17, 32), 32
    for num_queries, window in ((1, None), (1, 4), (3, None), (3, 4)):
        q, k, v = (
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in ((3, num_queries, num_heads, width), *[(num_kv_heads, 3, num_keys, width)] * 2)
        )
        positions_BQ = torch.tensor([list(range(length - num_queries, length)) for length in lengths], device=device)
        try:
            out = kernel(q, k, v, Reach(positions_BQ, num_keys, window, num_heads // num_kv_heads, dtype))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return str(error).splitlines()[0]
        for row, length in enumerate(lengths):
            mask = Mask(num_past=length - num_queries, window=window)
            k_SKD, v_SKD = (x[:, row, :length].transpose(0, 1).float() for x in (k, v))
            expected = dense_attention(q[row][None].float(), k_SKD[None], v_SKD[None], mask)[0]
            gap = (out[row].float() - expected).abs().max().item()
            if not gap < (1e-4 if dtype == torch.float32 else 3e-2):
                return f"off by {gap:.2g} with {num_queries} queries and the window {window}"
    return None
