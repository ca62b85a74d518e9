"""Which layers each stage of a pipeline holds: the cut whose slowest stage is fastest, by measured time.

The vocabulary on the last stage may take as long as many layers, so stages of equally many layers are not equally fast.
Shapes: B requests that decode together, C model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.hub import read_config

_NUM_TRIALS = 5


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
    """How many layers' time the vocabulary takes, when as many requests as there may be decode with the cache half full."""
    num_layers = read_config(directory).num_hidden_layers
    stage = Stage.load(directory, config, range(num_layers - 1, num_layers))
    longest = min(config.max_model_len or math.inf, stage.decoder.config.max_position_embeddings)
    batch, hidden_BC = (
        _decodes(config, int(longest)),
        torch.zeros(config.max_num_seqs, stage.width, dtype=stage.dtype, device=stage.device),
    )
    head_s = _fastest(lambda: stage.decoder.project(hidden_BC))
    return head_s / _fastest(lambda: stage.forward(batch, hidden_BC))


def _decodes(config: EngineConfig, longest: int) -> ForwardBatch:
    num_seqs, size = config.max_num_seqs, config.block_size
    num_blocks = max(config.num_blocks // (2 * num_seqs), 1)
    tables = tuple(tuple((i * num_blocks + j) % config.num_blocks for j in range(num_blocks)) for i in range(num_seqs))
    last = min(num_blocks * size, longest) - 1
    slots = tuple(table[last // size] * size + last % size for table in tables)
    return ForwardBatch((0,) * num_seqs, (last,) * num_seqs, slots, (1,) * num_seqs, tables, (), ())


@torch.inference_mode()
def _fastest(compute: Callable[[], Tensor]) -> float:
    """Seconds of the fastest trial after a first one; reading a number waits for the device."""
    seconds = []
    for _ in range(_NUM_TRIALS + 1):
        start_s = time.perf_counter()
        compute().flatten()[0].item()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds[1:])
