"""The blocks of a stage on a CPU, but for the products, are native.cpp's.

Between two products are many small operations; here they are four calls for a block. Where native.cpp has the products too, a
step is one call.

Shapes: T tokens of N sequences, C model width, H query heads, D head width, F width between gate and down, M pages of the
longest context, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ctypes import byref
from itertools import accumulate

import torch
from torch import Tensor, nn

from powerhouse.engine import native
from powerhouse.engine.adapters import AdaptedLinear
from powerhouse.engine.attention import PagedAttention, PagedCache, pad
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.formats import Int8DynamicLinear
from powerhouse.engine.fused import FusedBlock, FusedDecoder, FusedNorm
from powerhouse.engine.native import Weights
from powerhouse.errors import ConfigError

_LOG = logging.getLogger(__name__)
_TRIED_TOKENS = 40
_CLOSE = 0.02
"""Of the norm: where activations are rounded, a last bit can tip a rounding."""


class CompiledBlocks:
    """The blocks of a stage, for those without an adapter, and its vocabulary.

    Raises:
        ConfigError: not on this device or in this precision, there is no C++ compiler, or what it makes is wrong.
    """

    def __init__(self, decoder: FusedDecoder, cache: PagedCache) -> None:
        if cache.k_LKNPD.device.type != "cpu":
            raise ConfigError("compiles: on a CPU only", got=str(cache.k_LKNPD.device), do="leave it out")
        self._decoder, self._cache, self._library = decoder, cache, native.load()
        self._held: list[Tensor] = []
        """What structures have the addresses of."""
        self._shape = self._make_shape()
        self._blocks = (native.Block * len(decoder.blocks))(*map(self._make_block, decoder.blocks))
        blocks = [block for block in decoder.blocks.values() if isinstance(block, FusedBlock)]
        self._most_rows = min(_most_rows(_products(block)) for block in blocks)
        if decoder.is_last:
            self._norm, self._projection = self._make_norm(decoder.norm), _weights(decoder.lm_head)
        self._check()
        _LOG.info("blocks are compiled")

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether nobody has an adapter."""
        return not batch.adapters

    def transform(self, x: Tensor, positions_T: Tensor, batch: ForwardBatch) -> Tensor:
        """Ids [T] (first slice) or hidden states [T, C] to hidden states [T, C]."""
        return self._run(self._decoder.embed_tokens(x).float() if self._decoder.is_first else x, positions_T, batch)

    def _run(self, x_TC: Tensor, positions_T: Tensor, batch: ForwardBatch, part: slice = slice(None)) -> Tensor:
        x_TC = x_TC.clone()  # native.cpp adds to it
        num_pages = max(map(len, batch.block_tables))
        tables_NM = torch.tensor([pad(table, num_pages) for table in batch.block_tables])
        starts_N = torch.tensor([0, *accumulate(batch.query_lengths)])
        addresses = positions_T.data_ptr(), tables_NM.data_ptr(), starts_N.data_ptr()
        step = native.Step(len(x_TC), len(tables_NM), num_pages, *addresses, torch.get_num_threads())
        if len(x_TC) <= self._most_rows:
            first, stop, _ = part.indices(len(self._blocks))
            self._library.run(byref(self._shape), byref(step), byref(self._blocks[first]), stop - first, x_TC.data_ptr())
        else:
            for block, made in zip(list(self._decoder.blocks.values())[part], self._blocks[part], strict=True):
                self._run_block(block, made, step, x_TC)
        return x_TC

    def project(self, x_TC: Tensor) -> Tensor:
        """The last hidden states to fp32 logits [T, V]."""
        if not self._projection or len(x_TC) > self._projection.most_rows:
            return self._decoder.project(x_TC)
        return self._projection.multiply(self._normalise(self._norm, x_TC))

    def _run_block(self, block: nn.Module, made: native.Block, step: native.Step, x_TC: Tensor) -> None:
        """x_TC is changed."""
        assert isinstance(block, FusedBlock), "a decoder is made of blocks"
        qkv_TA = self._multiply(block.qkv_proj, self._normalise(made.input_norm, x_TC))
        heads_TA = x_TC.new_empty(len(x_TC), block.shape.num_heads * block.shape.head_dim)
        self._library.attend(byref(self._shape), byref(step), byref(made), qkv_TA.data_ptr(), heads_TA.data_ptr())
        x_TC += self._multiply(block.o_proj, heads_TA)
        gate_up_T2F = self._multiply(block.gate_up_proj, self._normalise(made.mlp_norm, x_TC))
        x_TC += self._multiply(block.down_proj, self._gate(gate_up_T2F, step.num_threads))

    def _multiply(self, linear: nn.Module, x_TI: Tensor) -> Tensor:
        linear = _base(linear)
        if not isinstance(linear, Int8DynamicLinear):
            out_TO: Tensor = linear(x_TI)
            return out_TO
        unit_TI, largest_T1 = torch.empty_like(x_TI), x_TI.new_empty(len(x_TI), 1)
        self._library.unit(x_TI.data_ptr(), unit_TI.data_ptr(), largest_T1.data_ptr(), *x_TI.shape, torch.get_num_threads())
        return linear.product(unit_TI, largest_T1)

    def _normalise(self, norm: native.Norm, x_TC: Tensor) -> Tensor:
        out_TC = torch.empty_like(x_TC)
        self._library.norm(byref(norm), x_TC.data_ptr(), out_TC.data_ptr(), *x_TC.shape, torch.get_num_threads())
        return out_TC

    def _gate(self, gate_up_T2F: Tensor, num_threads: int) -> Tensor:
        num_tokens, width = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
        out_TF = gate_up_T2F.new_empty(num_tokens, width)
        self._library.gate(gate_up_T2F.data_ptr(), out_TF.data_ptr(), num_tokens, width, num_threads)
        return out_TF

    def _make_shape(self) -> native.Shape:
        decoder, cache = self._decoder, self._cache
        num_slots, head_width = cache.pages(cache.first_layer)[0].shape[1:]
        tables = map(self._address, decoder.rope_table)
        sizes = decoder.config.hidden_size, *cache.heads, head_width, num_slots, cache.block_size
        return native.Shape(*sizes, *tables, cache.k_LKNPD.itemsize)

    def _make_block(self, name: str) -> native.Block:
        block, layer = self._decoder.blocks[name], int(name)
        assert isinstance(block, FusedBlock), "a decoder is made of blocks"
        assert block.activation is nn.functional.silu, "a decoder of llama's kind"
        norms = map(self._make_norm, (block.input_norm, block.mlp_norm, block.q_norm, block.k_norm))
        products = (weights.product if weights else native.Product() for weights in map(_weights, _products(block)))
        pages = map(self._address, self._cache.pages(layer))
        return native.Block(*norms, *products, *pages, self._decoder.config.window(layer) or 0)

    def _make_norm(self, norm: FusedNorm | None) -> native.Norm:
        return native.Norm(self._address(norm.weight_C), norm.eps) if norm else native.Norm()

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous(), "native.cpp knows no strides"
        self._held.append(tensor)
        return tensor.data_ptr()

    def _check(self) -> None:
        """Hold a block of each kind against the plain one: one request that decodes, several, and a chunk of a prompt."""
        decoder, cache = self._decoder, self._cache
        generator = torch.Generator().manual_seed(0)
        longest = min(_TRIED_TOKENS, decoder.num_positions, self._shape.num_slots)
        tables = (tuple(range(-(-longest // cache.block_size))),)
        for name in {decoder.config.window(int(name)): name for name in decoder.blocks}.values():
            for pages_KND in cache.pages(int(name)):
                pages_KND[:, :longest].normal_(generator=generator)
            for num, is_chunk in ((1, False), (min(3, longest), False), (min(3, longest), True)):
                positions = tuple(range(longest - num, longest))
                lengths = (num,) if is_chunk else (1,) * num
                batch = ForwardBatch((0,) * num, positions, positions, lengths, tables * len(lengths), (), ())
                x_TC = torch.randn((num, decoder.config.hidden_size), generator=generator)
                self._check_block(name, x_TC, batch)
            for pages_KND in cache.pages(int(name)):
                pages_KND.zero_()

    def _check_block(self, name: str, x_TC: Tensor, batch: ForwardBatch) -> None:
        positions_T, window = torch.tensor(batch.positions), self._decoder.config.window(int(name))
        rope = tuple(table_S1D[positions_T] for table_S1D in self._decoder.rope_table)
        plain_TC = self._decoder.blocks[name](x_TC, int(name), PagedAttention(self._cache, batch), rope, window)
        place = list(self._decoder.blocks).index(name)
        gap = (self._run(x_TC, positions_T, batch, slice(place, place + 1)) - plain_TC).norm() / plain_TC.norm()
        if not gap < _CLOSE:
            raise ConfigError("compiles: wrong numbers here", got=f"off by {gap:.2g} of their norm", do="leave it out")


def _base(linear: nn.Module) -> nn.Module:
    """What lies beneath adapters, which nobody in the batch has."""
    return linear.base if isinstance(linear, AdaptedLinear) else linear


def _weights(linear: nn.Module) -> Weights | None:
    weights: Weights | None = getattr(_base(linear), "native", None)
    return weights


def _products(block: FusedBlock) -> list[nn.Module]:
    return [block.qkv_proj, block.o_proj, block.gate_up_proj, block.down_proj]


def _most_rows(linears: Sequence[nn.Module]) -> int:
    """Up to how many rows all of them are multiplied here."""
    return min(weights.most_rows if weights else 0 for weights in map(_weights, linears))
