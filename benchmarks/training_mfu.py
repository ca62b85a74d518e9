"""Tokens/s, MFU and memory of training steps on one device, by size and by setting.

    python benchmarks/training_mfu.py --device cuda --sizes 135m 1b 3b --sequence 4096

Each case is the training's own model, sharded over one rank, and its own step, on random tokens, in a process of its own; the
first steps, in which blocks are compiled, are left out. MFU is model FLOPs (training/flops.py: 6 N + 12 L H D T a token,
attention counted whole, nothing computed again) over the peak, dense bfloat16, that is told beside it. On a CPU the memory is
the process's: `--device cpu --sizes wide --settings plain "loss in chunks" --chunk-tokens 128` shows what the logits take.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from measuring import in_own_process, peak_rss_mib, report
from powerhouse.training.build import build_model
from powerhouse.training.config import TrainingConfig
from powerhouse.training.empty import compute_dtype, empty_model
from powerhouse.training.flops import peak_of, row_flops
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train_step
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer

ROPE = {"kind": "llama3", "factor": 32.0, "original_context": 8192}
SIZES: dict[str, Any] = {
    "tiny": "tiny",
    "wide": {
        "vocab_size": 128256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
    "135m": "smollm2-135m",
    "1b": "llama-3.2-1b",
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": ROPE,
    },
}
CHUNK = "chunk"
"""Stands for --chunk-tokens."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss in chunks": {"loss_chunk_tokens": CHUNK},
    "compiled": {"compiles_blocks": True},
    "compiled, loss in chunks": {"compiles_blocks": True, "loss_chunk_tokens": CHUNK},
    "compiled, chunks, selective": {"compiles_blocks": True, "loss_chunk_tokens": CHUNK, "recompute": "selective"},
    "compiled, chunks, full": {"compiles_blocks": True, "loss_chunk_tokens": CHUNK, "recompute": "full"},
    "compiled, chunks, float8": {"compiles_blocks": True, "loss_chunk_tokens": CHUNK, "precision": "float8"},
}
"""Settings of the run, or `precision`, beside bfloat16."""


def make_config(case: dict[str, Any]) -> TrainingConfig:
    settings = dict(case["settings"])
    precision = settings.pop("precision", case["precision"])
    return TrainingConfig.model_validate(
        {
            "tokens": "unused",
            "output": "unused",
            "model": SIZES[case["size"]],
            "optim": {"lr": 1e-5},
            "precision": precision,
            "global_batch_rows": case["rows"],
            "num_steps": 1,
            "run": {"micro_batch_rows": case["rows"], "use_gpu": case["device"] == "cuda", **settings},
        }
    )


def run_case(case: dict[str, Any]) -> dict[str, float]:
    config, device = make_config(case), torch.device(case["device"])
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder)}/rendezvous", rank=0, world_size=1)
        try:
            return measure(config, device, case)
        finally:
            dist.destroy_process_group()


def measure(config: TrainingConfig, device: torch.device, case: dict[str, Any]) -> dict[str, float]:
    model = build_model(config, device)
    optimizer, guard = make_optimizer(model, config.optim), Guard(config.optim)
    objective = partial(method_of(config.shape).objective, chunk_tokens=config.run.loss_chunk_tokens)
    ids = torch.randint(0, config.shape.vocab_size, (case["rows"], case["sequence"] + 1), device=device)
    batch = {"inputs": ids[:, :-1], "labels": ids[:, 1:]}
    times = []
    for step in range(case["warm_up"] + case["steps"]):
        train_step(step, model, optimizer, guard, objective, batch, config.run)  # waits for the device: it returns numbers
        times.append(time.perf_counter())
    seconds = (times[-1] - times[case["warm_up"] - 1]) / case["steps"]
    flops, peak = row_flops(empty_model(config), {"inputs": case["sequence"]}).total, peak_of(device, compute_dtype(config))
    memory_gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else peak_rss_mib() * 2**20 / 1e9
    speed = case["rows"] * case["sequence"] / seconds
    mfu = case["rows"] * flops / seconds / peak.flops_per_s if peak else float("nan")
    return {"tokens_per_s": speed, "mfu": mfu, "peak_tflops": peak.flops_per_s / 1e12 if peak else 0.0, "memory_gb": memory_gb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["135m", "1b", "3b"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case)))
        return
    common = {name: getattr(arguments, name) for name in ("device", "precision", "sequence", "rows", "steps", "warm_up")}
    notes = {"chunk tokens": arguments.chunk_tokens}
    rows: list[tuple[Any, ...]] = []
    peak_tflops = None
    for size in arguments.sizes:
        for name in arguments.settings:
            settings = {key: arguments.chunk_tokens if value == CHUNK else value for key, value in SETTINGS[name].items()}
            try:
                found = in_own_process(__file__, {**common, "size": size, "settings": settings})
            except SystemExit as error:  # out of memory, most likely: the table says so, and goes on
                rows.append((size, name, str(error).strip().splitlines()[-1][:60], "-", "-"))
                continue
            peak_tflops = found["peak_tflops"]
            rows.append((size, name, found["tokens_per_s"], found["mfu"], found["memory_gb"]))
            print(f"{size}, {name}: {found['tokens_per_s']:,.0f} tokens/s", flush=True)
    report("training_mfu", ("size", "setting", "tokens/s", "MFU", "GB"), rows, {**common, **notes, "peak TFLOP/s": peak_tflops})


if __name__ == "__main__":
    main()
