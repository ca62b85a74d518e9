"""Steps in which every request decodes, replayed on a GPU from CUDA graphs: a launch for the whole stage, not one a kernel.

A graph is of one shape, so there is one for each bucket: so many requests, and so many blocks of the longest context, both
powers of two up to the most that there may be. A batch takes the smallest bucket that it fits into; the rows that it does not
fill write to a block of the cache that nobody owns, and attend to that. All buckets are captured when the stage starts, the
largest first, in one pool of memory, whose parts the smaller ones use again. Captured when they are first met, they would make
requests wait in the middle of serving, find out there that memory is short, and be spoilt by what other threads (NCCL's
watchdog) ask of the GPU.

What lies between two attentions is compiled: one piece of code for all blocks and any number of requests, one more for one.

Shapes: B requests, M blocks of the longest context, P tokens in a block, S = M x P keys, H query heads, K key/value heads, D
head width, C model width.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from powerhouse.device import upload
from powerhouse.engine.attention import PagedAttention, PagedCache
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.fused import FusedBlock, FusedDecoder
from powerhouse.engine.kernels import Reach
from powerhouse.engine.settings import EngineConfig
from powerhouse.errors import ConfigError
from powerhouse.models.attention import PositionBias

_LOG = logging.getLogger(__name__)
_FEWEST_TOKENS = 128
"""Of the smallest bucket's contexts: below, reading less of the cache spares less than a launch costs."""
_TRIED_REQUESTS = (1, 16)
"""Rows with which code is made: of one request, and of several, whose number varies."""
_CLOSE = 0.02
"""Of the largest number, in one block."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""A computation -> what does it again, with what its inputs hold by then."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Inputs:
    """What a captured step reads, at addresses that stay. Zeros at first, which is what rows that nobody fills have."""

    x: Tensor
    """Ids [B] (first slice) or hidden states [B, C]."""
    positions_B: Tensor
    places_BX: Tensor
    """[B, 1 + M] the slot of the new key and value, then the blocks of the context."""

    def fill(self, x: Tensor, positions_B: Tensor, places_BX: Tensor) -> None:
        """The given rows, fewer perhaps than there are; `places_BX` has all of them."""
        for held, given in ((self.x, x), (self.positions_B, positions_B)):
            held[: len(given)].copy_(given)
            held[len(given) :].zero_()
        self.places_BX.copy_(places_BX)


class GraphedAttention:
    """The `Attend` of one new token for each request, of shapes that do not depend on the contexts: all are as long as S."""

    def __init__(self, cache: PagedCache, inputs: Inputs) -> None:
        self._cache = cache
        self._slots_B, tables_BM = inputs.places_BX[:, 0], inputs.places_BX[:, 1:]
        self._blocks, self._positions_B1 = tables_BM.flatten(), inputs.positions_B[:, None]
        self._num_keys = tables_BM.shape[1] * cache.block_size
        self._reaches: dict[int | None, Reach] = {}  # by window

    def __call__(
        self,
        layer: int,
        q_BHD: Tensor,
        k_BKD: Tensor,
        v_BKD: Tensor,
        /,
        *,
        window: int | None = None,
        bias: PositionBias | None = None,
    ) -> Tensor:
        assert bias is None, "no decoder that pages its cache has a position bias"
        cache = self._cache
        if window not in self._reaches:
            self._reaches[window] = Reach(self._positions_B1, self._num_keys, window, cache.num_groups, cache.dtype)
        cache.write(layer, self._slots_B, k_BKD, v_BKD)
        k_KBSD, v_KBSD = cache.read(layer, self._blocks, len(q_BHD))
        return cache.kernel(q_BHD[:, None], k_KBSD, v_KBSD, self._reaches[window])[:, 0]


class CudaGraphs:
    """The layers of a stage, for the steps that only decode. The cache's last block is no request's.

    Raises:
        ConfigError: blocks cannot be compiled here, or what comes out is wrong, or memory is too short for the graphs.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: PagedCache,
        config: EngineConfig,
        capture: Capture | None = None,
        compile_piece: Compile | None = None,
    ) -> None:
        self._decoder, self._cache = decoder, cache
        self._spare = cache.k_LKNPD.shape[2] - 1
        self._nums_requests = buckets(1, -(-config.max_num_seqs // config.num_stages))
        longest = min(-(-decoder.num_positions // cache.block_size), self._spare)
        self._nums_blocks = buckets(-(-_FEWEST_TOKENS // cache.block_size), longest)
        compile_piece = compile_piece or partial(_compile, is_int8=config.quantization == "int8")
        self._before = compile_piece(FusedBlock.queries_keys_values)
        self._after = compile_piece(FusedBlock.finish)
        for name in {decoder.config.window(int(name)): name for name in decoder.blocks}.values():
            for num in _TRIED_REQUESTS[: len(self._nums_requests)]:
                self._try(name, num)
        self._graphs = self._capture_all(capture or _CaptureGraph())
        _LOG.info("steps that only decode are compiled, and captured in %d CUDA graphs", len(self._graphs))

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether everyone decodes, has no adapter, and there is a bucket for them."""
        is_decode = batch.num_tokens == len(batch.query_lengths) and not batch.adapters
        return is_decode and self._bucket(batch) is not None

    def transform(self, x: Tensor, positions_B: Tensor, batch: ForwardBatch) -> Tensor:
        """Ids [B] (first slice) or hidden states [B, C] to hidden states [B, C]."""
        bucket = self._bucket(batch)
        assert bucket is not None, "this batch is not taken"
        inputs, replay = self._graphs[bucket]
        inputs.fill(x, positions_B, upload(self._places(batch, *bucket), x.device))
        return replay()[: len(x)].clone()  # the graph's own would change under whoever still sends or samples it

    def _bucket(self, batch: ForwardBatch) -> tuple[int, int] | None:
        num_requests = _smallest(self._nums_requests, len(batch.block_tables))
        num_blocks = _smallest(self._nums_blocks, max(map(len, batch.block_tables)))
        if num_requests is None or num_blocks is None or not self._is_worth(num_requests, num_blocks):
            return None
        return num_requests, num_blocks

    def _is_worth(self, num_requests: int, num_blocks: int) -> bool:
        """Contexts of about one length that fill the cache are; beyond, padding to the longest takes more than it spares."""
        return num_requests * num_blocks < 4 * self._spare

    def _places(self, batch: ForwardBatch, num_requests: int, num_blocks: int) -> list[list[int]]:
        spare = [self._spare] * num_blocks
        rows = [[slot, *table, *spare[len(table) :]] for slot, table in zip(batch.slots, batch.block_tables, strict=True)]
        return rows + [[self._spare * self._cache.block_size, *spare]] * (num_requests - len(rows))

    def _inputs(self, num_requests: int, num_blocks: int) -> Inputs:
        decoder, device = self._decoder, self._cache.k_LKNPD.device
        positions_B = torch.zeros(num_requests, dtype=torch.long, device=device)
        shape = num_requests, decoder.config.hidden_size
        x = positions_B.clone() if decoder.is_first else torch.zeros(shape, dtype=decoder.dtype, device=device)
        empty = ForwardBatch((), (), (), (), (), (), ())
        return Inputs(x, positions_B, upload(self._places(empty, num_requests, num_blocks), device))

    def _run(self, inputs: Inputs) -> Tensor:
        """What is captured. Nothing here may wait for the GPU or depend on a number that it holds."""
        x_BC, rope = self._decoder.enter(inputs.x, inputs.positions_B)
        attend = GraphedAttention(self._cache, inputs)
        for name, block in self._decoder.blocks.items():
            q, k, v = self._before(block, x_BC, rope)
            heads_BHD = attend(int(name), q, k, v, window=self._decoder.config.window(int(name)))
            x_BC = self._after(block, x_BC, heads_BHD)
        return x_BC

    def _capture_all(self, capture: Capture) -> dict[tuple[int, int], tuple[Inputs, Run]]:
        shapes = [(b, m) for b in self._nums_requests for m in self._nums_blocks if self._is_worth(b, m)]
        graphs = {}
        try:
            for shape in sorted(shapes, key=lambda shape: -shape[0] * shape[1]):
                inputs = self._inputs(*shape)
                graphs[shape] = inputs, capture(partial(self._run, inputs))
        except RuntimeError as error:
            do = "lower max_num_seqs, num_blocks or max_model_len, or leave it out"
            raise ConfigError("compiles: cannot be captured", got=_first_line(error), do=do) from error
        return graphs

    def _try(self, name: str, num: int) -> None:
        """Have the code made, and hold its numbers against those of the plain block, in a cache of nothing yet."""
        decoder, cache, layer = self._decoder, self._cache, int(name)
        block, window = decoder.blocks[name], decoder.config.window(layer)
        num_slots = self._spare * cache.block_size
        num, length = min(num, num_slots), min(_FEWEST_TOKENS, decoder.num_positions, num_slots)
        generator = torch.Generator().manual_seed(0)
        x_BC = torch.randn((num, decoder.config.hidden_size), generator=generator).to(cache.k_LKNPD.device, decoder.dtype)
        batch = _tried_batch(num, length, cache.block_size)
        inputs = self._inputs(num, len(batch.block_tables[0]))
        places_BX = upload(self._places(batch, num, len(batch.block_tables[0])), x_BC.device)
        inputs.fill(inputs.x, upload(batch.positions, x_BC.device), places_BX)
        _, rope = decoder.enter(inputs.x if decoder.is_first else x_BC, inputs.positions_B)
        for pages_KND in cache.pages(layer):
            read_KND = pages_KND[:, :length]
            read_KND.copy_(torch.randn(read_KND.shape, generator=generator))
        try:
            q, k, v = self._before(block, _varied(x_BC), (_varied(rope[0]), _varied(rope[1])))
            heads_BHD = GraphedAttention(cache, inputs)(layer, q, k, v, window=window)
            found_BC = self._after(block, x_BC, _varied(heads_BHD))
        except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            do = "install Triton and a C compiler, or leave it out"
            raise ConfigError("compiles: cannot be compiled", got=_first_line(error), do=do) from error
        plain_BC = block(x_BC, layer, PagedAttention(cache, batch), rope, window)
        for pages_KND in cache.pages(layer):
            pages_KND.zero_()
        gap, largest = (found_BC - plain_BC).abs().max().item(), plain_BC.abs().max().item()
        if not gap < _CLOSE * largest:
            got = f"off by {gap:.2g} of {largest:.2g}"
            raise ConfigError("compiles: wrong numbers here", got=got, do="leave it out")


class _CaptureGraph:
    """Captures in one pool of memory: graphs are never replayed at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # what a first call makes, such as code and workspaces, is no part of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def buckets(smallest: int, largest: int) -> list[int]:
    """Powers of two from that of `smallest`, and `largest`."""
    first = (smallest - 1).bit_length()
    return [*(2**i for i in range(first, (largest - 1).bit_length())), largest]


def _smallest(sizes: list[int], num: int) -> int | None:
    """The smallest that is no less."""
    place = bisect_left(sizes, num)
    return sizes[place] if place < len(sizes) else None


def _compile(piece: Callable[..., Any], *, is_int8: bool) -> Callable[..., Any]:
    """With a single row a product becomes a sum that reads int8 as it is; with more, one of Triton's can, which are tried."""
    options: dict[str, Any] = {"coordinate_descent_tuning": True, "max_autotune_gemm": is_int8}
    compiled: Callable[..., Any] = torch.compile(piece, fullgraph=True, options=options)
    return compiled


def _tried_batch(num: int, length: int, block_size: int) -> ForwardBatch:
    """So many requests of one length; their contexts may as well be the same."""
    table = tuple(range(-(-length // block_size)))
    return ForwardBatch((0,) * num, (length - 1,) * num, tuple(range(num)), (1,) * num, (table,) * num, (), ())


def _varied(x: Tensor) -> Tensor:
    """Of a number of rows that may be another, for code that is made of it."""
    if len(x) > 1:
        torch._dynamo.mark_dynamic(x, 0)
    return x


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
