"""Which layers each stage of a pipeline holds: the cut whose slowest stage is fastest, by measured time.

The vocabulary on the last stage may take as long as many layers, so stages of equally many layers are not equally fast. How
many depends on the work: only tokens that are written reach the vocabulary, while layers compute those of prompts too.
Shapes: T tokens of a batch, B requests of it that decode, C model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from powerhouse.device import choose_device
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.hub import read_config

_NUM_TRIALS = 5
_READ_PER_WRITTEN = 2
"""Tokens of prompts that are expected for each of answers; chats have about one, questions about documents ten and more."""


def cut_layers(num_layers: int, num_stages: int, head_layers: float = 0.0) -> list[range]:
    """Cut the layers into consecutive runs; the last stage has the vocabulary besides, which costs as `head_layers` do.

    Of the cuts whose slowest stage is equally fast, that with the fewest layers on the last one: it samples too.

    Raises:
        ConfigError: there are more stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(
            "more pipeline stages than layers", got=num_stages, allowed=f"1 to {num_layers}", do="lower num_stages"
        )
    if num_stages == 1:
        return [range(num_layers)]
    num_others = num_stages - 1

    def slowest(num_last: int) -> float:
        return max(-(-(num_layers - num_last) // num_others), num_last + head_layers)

    num_last = min(range(1, num_layers - num_others + 1), key=slowest)
    short, num_longer = divmod(num_layers - num_last, num_others)
    starts = [i * short + min(i, num_longer) for i in range(num_stages)]
    return [range(start, stop) for start, stop in pairwise([*starts, num_layers])]


def measure_head(directory: Path, config: EngineConfig) -> float:
    """How many layers' time the vocabulary takes for a batch as a stage gets it: its share of the requests that there may be
    decodes, with the cache half full, and a prompt is computed beside them.
    """
    num_layers = read_config(directory).num_hidden_layers
    if choose_device(config.device).type == "cuda":  # a batch with a prompt never runs what is captured
        config = config.model_copy(update={"compiles": False})
    stage = Stage.load(directory, config, range(num_layers - 1, num_layers))
    longest = min(config.max_model_len or math.inf, stage.decoder.config.max_position_embeddings)
    num_decodes = -(-config.max_num_seqs // config.num_stages)
    batch = _batch(config, num_decodes, int(longest))
    hidden_TC = torch.zeros(batch.num_tokens, stage.width, dtype=stage.dtype, device=stage.device)
    head_s = _fastest(lambda: stage.project(hidden_TC[:num_decodes]))
    return head_s / _fastest(lambda: stage.forward(batch, hidden_TC))


def _batch(config: EngineConfig, num_decodes: int, longest: int) -> ForwardBatch:
    """Decodes of half the cache, and one prompt; where the cache is small they share blocks."""
    size = config.block_size
    num_blocks = max(config.num_blocks // (2 * config.max_num_seqs), 1)
    last = min(num_blocks * size, longest) - 1
    num_read = min(_READ_PER_WRITTEN * num_decodes, config.num_blocks * size, longest)
    spans = [range(last, last + 1)] * num_decodes + [range(num_read)]
    tables = [_blocks(config, i * num_blocks, span.stop) for i, span in enumerate(spans)]
    return ForwardBatch(
        (0,) * (num_decodes + num_read),
        tuple(position for span in spans for position in span),
        tuple(table[at // size] * size + at % size for table, span in zip(tables, spans, strict=True) for at in span),
        tuple(len(span) for span in spans),
        tuple(tables),
        (),
        (),
    )


def _blocks(config: EngineConfig, first: int, num_tokens: int) -> tuple[int, ...]:
    return tuple((first + i) % config.num_blocks for i in range(-(-num_tokens // config.block_size)))


@torch.inference_mode()
def _fastest(compute: Callable[[], Tensor]) -> float:
    """Seconds of the fastest trial after a first one; reading a number waits for the device."""
    seconds = []
    for _ in range(_NUM_TRIALS + 1):
        start_s = time.perf_counter()
        compute().flatten()[0].item()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds[1:])
