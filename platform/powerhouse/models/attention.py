"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), behind one seam.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads (H is a multiple of K), G = H / K, D head
width.

A model's forward pass takes an `Attend`: it hands over the new queries, keys and values of a layer and gets the outputs
back. What was before them - nothing, a dense cache, pages - is the callable's business, so training, the reference loop
and the engine run the same model code. The leading axes are the callable's too: [B, T] or the engine's flat [T].

`kernels.py` computes; here is what it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

PositionBias = Callable[[Tensor], Tensor]
"""distance_* (key position minus query position) -> bias_H*, added to the scaled scores."""


class Attend(Protocol):
    """(layer, q_*HD, k_*KD, v_*KD) -> o_*HD."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None = None, bias: PositionBias | None = None
    ) -> Tensor:
        """Attend over the `window` nearest keys up to the query's own, or over all; `bias` is added to the scores."""
        ...


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may see; query t stands at position num_past + t of the keys' axis.

    In causal attention a query sees itself even where it is padding: every softmax has something to sum over.
    """

    is_causal: bool = True
    """No key after the query."""
    num_past: int = 0
    """Keys that stand before the first query."""
    window: int | None = None
    """With is_causal: no key further back than window - 1 positions."""
    valid_BS: Tensor | None = None
    """False at keys that are padding."""
    document_BS: Tensor | None = None
    """Numbers of documents packed in a row: keys of another document are not seen."""
    query_document_BT: Tensor | None = None
    """Those of the queries, where they stand on an axis of their own, as in cross-attention."""

    def sees(self, query: Tensor, key: Tensor, row: Tensor) -> Tensor:
        """Tell for positions on the keys' axis, all broadcast together, whether the query may see the key."""
        seen = key >= 0
        if self.is_causal:
            seen = seen & (key <= query)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.document_BS is not None:
            own = self.document_BS if self.query_document_BT is None else self.query_document_BT
            seen = seen & (own[row, query] == self.document_BS[row, key])
        if self.valid_BS is not None:
            seen = seen & self.valid_BS[row, key]
            if self.is_causal:
                seen = seen | (key == query)
        return seen

    def block(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """The mask of some queries (counted from the first) and keys: [B or 1, T, S], True for "may see"."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None] + self.num_past
        key = torch.arange(keys.start, keys.stop, device=device)
        return self.sees(query, key, torch.arange(self.num_rows, device=device)[:, None, None]).expand(
            self.num_rows, len(queries), len(keys)
        )

    @property
    def num_rows(self) -> int:
        """B where the rows differ, else 1."""
        return next((len(tensor) for tensor in (self.valid_BS, self.document_BS) if tensor is not None), 1)

    @property
    def differs_by_row(self) -> bool:
        return self.valid_BS is not None or self.document_BS is not None


class Kernel(Protocol):
    """(q_BTHD, k_BSKD, v_BSKD, mask, bias) -> o_BTHD."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None = None, /) -> Tensor: ...


def document_positions(documents_BT: Tensor) -> Tensor:
    """Positions [B, T] that start anew with each document; a document's tokens stand together."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_first = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_T - torch.where(is_first, places_T, 0).cummax(dim=1).values


def distances(mask: Mask, queries: range, keys: range, device: torch.device) -> Tensor:
    """Key position minus query position: [T, S]."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None] + mask.num_past
    return torch.arange(keys.start, keys.stop, device=device) - query


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: PositionBias | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V, line by line: the yardstick for every faster kernel."""
    num_groups = q.shape[2] // k.shape[2]
    k_BSHD, v_BSHD = k.repeat_interleave(num_groups, dim=2), v.repeat_interleave(num_groups, dim=2)
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q, k_BSHD) / q.shape[-1] ** 0.5
    queries, keys = range(q.shape[1]), range(k.shape[1])
    if bias is not None:
        scores_BHTS = scores_BHTS + bias(distances(mask, queries, keys, q.device))
    scores_BHTS = scores_BHTS.masked_fill(~mask.block(queries, keys, q.device)[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores_BHTS.softmax(dim=-1), v_BSHD)


class RowAttention:
    """Attend over whole rows at once: the `Attend` of training, of encoders and of cross-attention."""

    def __init__(self, mask: Mask = Mask(), kernel: Kernel = dense_attention) -> None:
        self.kernel = kernel
        self._masks: dict[int | None, Mask] = {None: mask}  # one object for each window: a kernel may know it again

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, bias: PositionBias | None = None
    ) -> Tensor:
        if window not in self._masks:
            self._masks[window] = replace(self._masks[None], window=window)
        return self.kernel(q, k, v, self._masks[window], bias)


class DenseCache:
    """Keys and values of all earlier positions of one batch, grown by concatenation: the `Attend` of plain decoding.

    `valid_BS` is False at the padding of the first pass, where rows of several lengths were padded on the left.
    """

    def __init__(self, valid_BS: Tensor | None = None, kernel: Kernel = dense_attention) -> None:
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self._valid_BS = valid_BS
        self._kernel = kernel

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, bias: PositionBias | None = None
    ) -> Tensor:
        num_past = 0
        if layer in self._past:
            past_k, past_v = self._past[layer]
            k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
            num_past = past_k.shape[1]
        self._past[layer] = k, v
        mask = Mask(num_past=num_past, window=window, valid_BS=self._valid(k.shape[1]))
        return self._kernel(q, k, v, mask, bias)

    def _valid(self, length: int) -> Tensor | None:
        """Padding is only in the first pass: what came after it is text."""
        if self._valid_BS is None:
            return None
        num_rows, num_known = self._valid_BS.shape
        return torch.cat([self._valid_BS, self._valid_BS.new_ones(num_rows, length - num_known)], dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order: beams that go on."""
        self._past = {layer: (k[rows], v[rows]) for layer, (k, v) in self._past.items()}
        if self._valid_BS is not None:
            self._valid_BS = self._valid_BS[rows]
