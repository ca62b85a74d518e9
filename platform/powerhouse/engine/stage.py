"""A run of layers and their part of the KV cache: what computes. It takes no decisions, the batch carries them all.

Shapes: T tokens, C model width, B rows that get a new token, S rows of a prompt that are scored, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from powerhouse.device import choose_device, reuse_freed_memory, to_dtype, upload
from powerhouse.engine.adapters import AdaptedStage, load_adapters
from powerhouse.engine.attention import PagedAttention, PagedCache
from powerhouse.engine.batch import BatchResult, ForwardBatch
from powerhouse.engine.compiled import CompiledBlocks
from powerhouse.engine.formats import compute_dtype, make_pack, pages_dtype
from powerhouse.engine.fused import FusedDecoder
from powerhouse.engine.graphs import CudaGraphs
from powerhouse.engine.logprobs import TokenLogprobs, score
from powerhouse.engine.sampler import sample
from powerhouse.engine.settings import EngineConfig
from powerhouse.models.adapters import Adapter
from powerhouse.models.decoder import Decoder
from powerhouse.models.hub import load_decoder

_SCORED_AT_A_TIME = 128


class Stage:
    """The layers of `decoder`, which may be a slice of a model, with their keys and values."""

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, config: EngineConfig, adapters: Sequence[Adapter] = (), *, empties: bool = False
    ) -> None:
        """With `empties` the decoder is of no use afterwards, and its memory is spared."""
        weight = next(decoder.parameters())
        self.is_first, self.is_last = decoder.is_first, decoder.is_last
        self.width = decoder.config.hidden_size
        self.device, self.dtype = weight.device, compute_dtype(weight.dtype, weight.device)
        num_positions = min(config.max_model_len or math.inf, decoder.config.max_position_embeddings)
        pack = make_pack(config, weight.dtype, self.device)
        self.decoder = FusedDecoder(decoder, pack, self.dtype, int(num_positions), empties=empties)
        self.adapted = AdaptedStage(self.decoder, adapters) if adapters else None
        is_graphed = config.compiles and self.device.type == "cuda"
        num_blocks = config.num_blocks + is_graphed  # one more, for rows that are nobody's
        kinds = self.dtype, self.device, pages_dtype(config, weight.dtype, self.device)
        self._cache = PagedCache(decoder.config, decoder.layers, num_blocks, config.block_size, *kinds)
        self.compiled: CompiledBlocks | CudaGraphs | None = None
        self.project = self.decoder.project
        if is_graphed:
            self.compiled = CudaGraphs(self.decoder, self._cache, config)
        elif config.compiles:
            self.compiled = CompiledBlocks(self.decoder, self._cache)
            self.project = self.compiled.project

    @classmethod
    def load(cls, directory: Path, config: EngineConfig, layers: range | None = None) -> Stage:
        """Load these layers, or all, and no others.

        Raises:
            ModelFormatError: the directory is missing or damaged.
            ConfigError: there is no such device, or no such weight format on it.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        reuse_freed_memory()
        device = choose_device(config.device)
        decoder = load_decoder(directory, layers=layers, dtype=to_dtype(config.dtype), device=device)
        adapters = load_adapters(directory, list(config.adapters.values())) if config.adapters else []
        return cls(decoder, config, adapters, empties=True)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, hidden_TC: Tensor | None = None) -> Tensor:
        """Run the batch's tokens (first stage) or the hidden states from the stage before through the layers: [T, C]."""
        assert (hidden_TC is None) == self.is_first, "hidden states come from the stage before, if there is one"
        if self.adapted:
            self.adapted.select(batch)
        x = upload(batch.token_ids, self.device) if hidden_TC is None else hidden_TC
        positions_T = upload(batch.positions, self.device)
        with torch._C.DisableTorchFunctionSubclass():  # nothing here has one, and to look for it in packed weights takes time
            if self.compiled and self.compiled.takes(batch):
                return self.compiled.transform(x, positions_T, batch)
            return self.decoder.transform(x, positions_T, PagedAttention(self._cache, batch))

    @torch.inference_mode()
    def sample(self, batch: ForwardBatch, hidden_TC: Tensor) -> BatchResult:
        """Choose the new tokens from the last stage's hidden states, and tell the likelihoods that are asked for."""
        assert self.is_last, "only the last stage has the vocabulary"
        scored = self._score_prompts(batch, hidden_TC)
        if not batch.sampled_rows:
            return BatchResult([], [], scored)
        logits_BV = self.project(hidden_TC[upload(batch.sampled_rows, self.device)])
        token_ids = sample(logits_BV, batch.sampling)
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if asked := [(i, row.num_logprobs) for i, row in enumerate(batch.sampling) if row.num_logprobs is not None]:
            places, num_tops = zip(*asked, strict=True)
            for i, found in zip(places, score(logits_BV[list(places)], [token_ids[i] for i in places], num_tops), strict=True):
                logprobs[i] = found
        return BatchResult(token_ids, logprobs, scored)

    def _score_prompts(self, batch: ForwardBatch, hidden_TC: Tensor) -> list[TokenLogprobs]:
        """A few rows at a time: logits of a whole chunk would take more memory than its layers do."""
        scored: list[TokenLogprobs] = []
        for start in range(0, len(batch.scoring), _SCORED_AT_A_TIME):
            rows, token_ids, num_tops = zip(*batch.scoring[start : start + _SCORED_AT_A_TIME], strict=True)
            scored += score(self.decoder.project(hidden_TC[list(rows)]), token_ids, num_tops)
        return scored
