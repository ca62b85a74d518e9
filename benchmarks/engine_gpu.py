"""A decoding step on a GPU as a share of its memory bandwidth, and tokens a second by batch.

    python benchmarks/engine_gpu.py [--device cuda] [--shape llama-3.2-1b llama-3.1-8b] [--quantization int8]

Random weights in bfloat16, contexts of 512 tokens; decodes plain and, on a GPU, captured in CUDA graphs (`compiles`).
`bandwidth` is what one step has to read (weights once, keys and values of every context) over its time; `share` is that by the
bandwidth of a copy within the device, measured in the same run (read and write counted). `first token ms` is one prompt of 512
tokens, `ready s` what the stage took to start. `--device cpu --shape tiny` only shows that it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from measuring import report
from powerhouse.engine import EngineConfig
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.sampler import RowSampling
from powerhouse.engine.stage import Stage
from powerhouse.models.decoder import Decoder, DecoderConfig

CONTEXT, BLOCK = 512, 16
GREEDY = RowSampling(0.0, None, 1.0, 0.0)


def make_decoder(shape: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    config = DecoderConfig.model_validate({**DecoderConfig.SIZES[shape], "max_position_embeddings": 4 * CONTEXT})
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    decoder.tie_weights()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return decoder.eval()


def decode_batch(num: int) -> ForwardBatch:
    """One more token for each of `num` contexts."""
    size = CONTEXT // BLOCK
    tables = tuple(tuple(range(i * size, (i + 1) * size)) for i in range(num))
    slots = tuple(table[-1] * BLOCK + BLOCK - 1 for table in tables)
    return ForwardBatch((7,) * num, (CONTEXT - 1,) * num, slots, (1,) * num, tables, tuple(range(num)), (GREEDY,) * num)


def prompt_batch() -> ForwardBatch:
    places = tuple(range(CONTEXT))
    return ForwardBatch(
        (7,) * CONTEXT, places, places, (CONTEXT,), (tuple(range(CONTEXT // BLOCK)),), (CONTEXT - 1,), (GREEDY,)
    )


def step(stage: Stage, batch: ForwardBatch) -> list[int]:
    return stage.sample(batch, stage.forward(batch)).token_ids


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of several calls, each waited for."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a copy of 1 GiB (64 MiB on a CPU)."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"], choices=DecoderConfig.SIZES)
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--nums", type=int, nargs="+", default=[1, 32, 128, 256])
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), torch.bfloat16 if arguments.device == "cuda" else torch.float32
    copied, rows = copy_bandwidth(device), []
    bits = {"int8": 8, "int4": 5, None: 8 * dtype.itemsize}[arguments.quantization]  # int4 with its scales and centres
    ways = {"plain": False, "captured": True} if arguments.device == "cuda" else {"plain": False}
    for shape, (way, compiles) in product(arguments.shape, ways.items()):
        decoder = make_decoder(shape, device, dtype)
        config, num_weights = decoder.config, sum(p.numel() for p in decoder.parameters())
        kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CONTEXT * dtype.itemsize
        settings = {"num_blocks": max(arguments.nums) * CONTEXT // BLOCK, "block_size": BLOCK, "device": arguments.device}
        settings |= {"max_num_seqs": max(arguments.nums), "compiles": compiles}
        settings |= {"quantization": arguments.quantization} if arguments.quantization else {}
        start_s = time.perf_counter()
        stage = Stage(decoder, EngineConfig.model_validate(settings), empties=True)
        ready_s = time.perf_counter() - start_s
        first_s = seconds(partial(step, stage, prompt_batch()), device, 5)
        for num in arguments.nums:
            batch = decode_batch(num)
            assert not (stage.compiled and not stage.compiled.takes(batch)), "captured steps are to be measured"
            step_s = seconds(partial(step, stage, batch), device, 20)
            bandwidth = (num_weights * bits / 8 + num * kv_bytes) / step_s
            rates = num / step_s, bandwidth / 1e9, bandwidth / copied
            rows.append((shape, way, num, 1e3 * step_s, *rates, 1e3 * first_s, ready_s))
        del decoder, stage
    header = ("shape", "decodes", "at once", "step ms", "tok/s", "bandwidth GB/s", "share", "first token ms", "ready s")
    notes = {"copy GB/s": copied / 1e9, "quantization": arguments.quantization or "none"}
    report("engine_gpu", header, rows, notes)


if __name__ == "__main__":
    main()
