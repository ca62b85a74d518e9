"""Steps in which every request decodes, with blocks that torch.compile fuses: between two products of weights one loop or two.

A step of few requests waits for memory and for the many small operations around its products; compiled, these are a fifth of
the calls. One piece of code serves all blocks, and one more a single request: what differs between blocks is their tensors.

Shapes: B requests, S places in the blocks of the longest context, H query heads, K key/value heads, D head width, C model
width, N slots of a head's pages, R = B x H.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.engine.attention import PagedAttention, PagedCache, is_alike, pad
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.fused import FusedDecoder
from powerhouse.engine.kernels import first_slots
from powerhouse.errors import ConfigError
from powerhouse.models.attention import PositionBias
from powerhouse.models.layers import Rope

_LOG = logging.getLogger(__name__)
_TRIED_REQUESTS, _TRIED_TOKENS = (1, 8), 256
"""Steps on which code is made: of a single request, and of several, whose number varies. Threads are shared out by these."""
Run = Callable[[nn.Module, Tensor, "DecodeAttention", Rope], Tensor]
_CLOSE = 0.02
"""Of the largest number: where activations are rounded, a last bit can tip a rounding."""


@dataclass(frozen=True)
class DecodeAttention:
    """The `Attend` of one block in a step of one new token for each request: written so that it fuses."""

    k_KND: Tensor
    v_KND: Tensor
    slots_B: Tensor
    """Where new keys and values go."""
    slots_BS: Tensor
    """Where the keys of a context lie; anywhere after its end."""
    places_RS: Tensor
    """The same for each query head, in the pages of all key/value heads."""
    positions_B: Tensor

    def __call__(
        self,
        layer: int,
        q_BHD: Tensor,
        k_BKD: Tensor,
        v_BKD: Tensor,
        /,
        *,
        window: int | None,
        bias: PositionBias | None = None,
    ) -> Tensor:
        self.k_KND.index_copy_(1, self.slots_B, k_BKD.transpose(0, 1))
        self.v_KND.index_copy_(1, self.slots_B, v_BKD.transpose(0, 1))
        (batch, num_heads, width), num_kv_heads = q_BHD.shape, len(self.k_KND)
        q_BKG1D = q_BHD.reshape(batch, num_kv_heads, -1, 1, width)
        k_BK1SD = self.k_KND[:, self.slots_BS].transpose(0, 1).unsqueeze(2)
        scores_BKGS = (q_BKG1D * k_BK1SD).sum(-1) * width**-0.5
        distance_BS = self.positions_B[:, None] - torch.arange(self.slots_BS.shape[1], device=q_BHD.device)
        is_seen_BS = distance_BS >= 0 if window is None else (distance_BS >= 0) & (distance_BS < window)
        weights_BKGS = scores_BKGS.masked_fill(~is_seen_BS[:, None, None], float("-inf")).softmax(-1)
        out_RD = F.embedding_bag(
            self.places_RS, self.v_KND.flatten(0, 1), mode="sum", per_sample_weights=weights_BKGS.flatten(0, 2)
        )
        return out_RD.view(batch, num_heads, width)


def attends(cache: PagedCache, batch: ForwardBatch) -> Callable[[int], DecodeAttention]:
    """Layer -> its attention in this batch of decodes."""
    positions_B = torch.tensor(batch.positions)
    num_blocks = max(map(len, batch.block_tables))
    tables_BM = torch.tensor([pad(table, num_blocks) for table in batch.block_tables])
    slots_BS = (tables_BM[:, :, None] * cache.block_size + torch.arange(cache.block_size)).flatten(1)
    num_slots = cache.pages(cache.first_layer)[0].shape[1]
    places_RS = (slots_BS[:, None] + first_slots(cache.heads, num_slots)).flatten(0, 1)
    slots_B = torch.tensor(batch.slots)
    return lambda layer: DecodeAttention(*cache.pages(layer), slots_B, slots_BS, places_RS, positions_B)


class CompiledDecodes:
    """The blocks of a stage, compiled when it starts, for the steps that only decode.

    Raises:
        ConfigError: not on this device, or there is no C++ compiler, or what it makes is wrong.
    """

    def __init__(self, decoder: FusedDecoder, cache: PagedCache) -> None:
        if cache.k_LKNPD.device.type != "cpu":
            raise ConfigError("compiles_decodes: on a CPU only", got=str(cache.k_LKNPD.device), do="leave it out")
        self._decoder, self._cache = decoder, cache
        self._windows = {name: decoder.config.window(int(name)) for name in decoder.blocks}
        self._runs: dict[tuple[bool, int | None], Run] = {}
        for name in {window: name for name, window in self._windows.items()}.values():
            for num in _TRIED_REQUESTS:
                self._make(name, num)
        _LOG.info("steps that only decode are compiled")

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether everyone decodes, has no adapter, and no context is so long that padding to it would cost too much."""
        return batch.num_tokens == len(batch.query_lengths) and not batch.adapters and is_alike(batch, self._cache)

    def transform(self, x: Tensor, positions_B: Tensor, batch: ForwardBatch) -> Tensor:
        """Ids [B] (first slice) or hidden states [B, C] to hidden states [B, C]."""
        x, rope = self._decoder.enter(x, positions_B)
        attend = attends(self._cache, batch)
        for name, block in self._decoder.blocks.items():
            x = self._runs[len(x) == 1, self._windows[name]](block, x, attend(int(name)), rope)
        return x

    def _make(self, name: str, num: int) -> None:
        """Have the code made, and hold its numbers against those of the plain block."""
        decoder, cache, layer, window = self._decoder, self._cache, int(name), self._windows[name]
        generator = torch.Generator().manual_seed(0)
        num_slots = cache.pages(layer)[0].shape[1]
        num, longest = min(num, num_slots), min(_TRIED_TOKENS, decoder.num_positions)
        positions, table = (longest - 1,) * num, (0,) * -(-longest // cache.block_size)
        batch = ForwardBatch((0,) * num, positions, tuple(range(num)), (1,) * num, (table,) * num, (), ())
        x_BC = torch.randn((num, decoder.config.hidden_size), generator=generator).to(decoder.dtype)
        _, rope = decoder.enter(x_BC if not decoder.is_first else torch.zeros(num, dtype=torch.long), torch.tensor(positions))
        for pages_KND in cache.pages(layer):
            pages_KND[:, : cache.block_size].normal_(generator=generator)
        attend = attends(cache, batch)(layer)
        if num > 1:
            for tensor in (x_BC, *rope, attend.slots_B, attend.slots_BS, attend.places_RS, attend.positions_B):
                torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(attend.slots_BS, 1)
        torch._dynamo.mark_dynamic(attend.places_RS, 1)
        try:
            run = self._runs[num == 1, window] = _compile(window, decoder.blocks[name], x_BC, attend, rope)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                "compiles_decodes: cannot be compiled", got=first, do="install a C++ compiler, g++, or leave it out"
            ) from error
        found_BC = run(decoder.blocks[name], x_BC, attend, rope)
        plain_BC = decoder.blocks[name](x_BC, layer, PagedAttention(cache, batch), rope, window)
        for pages_KND in cache.pages(layer):
            pages_KND.zero_()
        gap, largest = (found_BC - plain_BC).abs().max().item(), plain_BC.abs().max().item()
        if not gap < _CLOSE * largest:
            raise ConfigError(
                "compiles_decodes: wrong numbers here", got=f"off by {gap:.2g} of {largest:.2g}", do="leave it out"
            )


def _compile(window: int | None, *arguments: Any) -> Run:
    """The code of blocks of one model and steps of one kind. It has no guards: nothing else reaches it."""

    def run(block: nn.Module, x_BC: Tensor, attend: DecodeAttention, rope: Rope) -> Tensor:
        out_BC: Tensor = block(x_BC, 0, attend, rope, window)
        return out_BC

    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "size_asserts": False,
        "alignment_asserts": False,
        "realize_reads_threshold": 1,  # rotated queries are computed once, and not again for each key
    }
    compiled: Any = torch.compile(run, fullgraph=True, options=options)
    made = compiled.aot_compile((arguments, {}))
    made.disable_guard_check()
    fast: Run = made.fn
    return fast
