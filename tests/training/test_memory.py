"""The memory that is foretold, beside what a real step allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from distributed import run_on_ranks
from fakes import tiny_config
from powerhouse.training.build import build_model
from powerhouse.training.config import TrainingConfig
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train_step
from powerhouse.training.memory import Memory, plan_memory
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer
from powerhouse.training.sharding import blocks_of
from tiny_run import make_config, sharded_model

NUM_POSITIONS = 192


def wide_config(folder: Path, precision: str, recompute: str) -> TrainingConfig:
    shape = tiny_config(
        vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32, max_position_embeddings=256
    )
    run = {"micro_batch_rows": 4, "cpus_per_worker": 1, "recompute": recompute}
    return make_config(folder, model=shape.model_dump(), precision=precision, global_batch_rows=8, run=run)


def ids(num_rows: int, device: str) -> dict[str, torch.Tensor]:
    return dict.fromkeys(("inputs", "labels"), torch.ones(num_rows, NUM_POSITIONS, dtype=torch.long, device=device))


def planned(config: TrainingConfig, num_workers: int) -> Memory:
    method = method_of(config.shape)
    with torch.device("meta"):
        model = method.model_class(config.shape)
    return plan_memory(
        model,
        blocks_of(model),
        method.objective,
        ids(config.run.micro_batch_rows, "meta"),
        num_workers=num_workers,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision],
        recompute=config.run.recompute,
    )


def allocate(config: TrainingConfig, folder: Path) -> int:
    """Most bytes that torch's CPU allocator held at one time, from before the model was made to after its second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model, optimizer = sharded_model(config)
        batch = ids(config.global_batch_rows // dist.get_world_size(), "cpu")
        for step in range(2):
            train_step(step, model, optimizer, Guard(config.optim), method_of(config.shape).objective, batch, config.run)
    path = folder / f"trace-{dist.get_rank()}.json"
    profiled.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "recompute", "num_workers"), [("float32", "full", 1), ("float32", "selective", 1), ("bfloat16", "none", 2)]
)
def test_a_step_allocates_what_was_foretold_and_no_more(
    tmp_path: Path, precision: str, recompute: str, num_workers: int
) -> None:
    config = wide_config(tmp_path, precision, recompute)

    measured = max(run_on_ranks(num_workers, allocate, config, tmp_path))

    foretold = planned(config, num_workers)
    assert 0.8 * foretold.total < measured < foretold.total


@pytest.mark.gpu
def test_a_gpu_allocates_what_was_foretold_and_no_more(tmp_path: Path) -> None:
    config = wide_config(tmp_path, "bfloat16", "none")
    method, device = method_of(config.shape), torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = build_model(config, device)
        optimizer = make_optimizer(model, config.optim)
        for step in range(2):
            train_step(step, model, optimizer, Guard(config.optim), method.objective, ids(8, "cuda"), config.run)
        measured = torch.cuda.max_memory_allocated() - before
    finally:
        dist.destroy_process_group()

    foretold = planned(config, 1).total
    assert 0.7 * foretold < measured < 1.1 * foretold  # cuBLAS has a workspace of its own
