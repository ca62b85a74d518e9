"""The memory that is foretold, beside what a real step allocates."""

from __future__ import annotations

import json
from functools import partial
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
from powerhouse.training.memory import Memory
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer
from powerhouse.training.plan import PlanConfig, make_plan
from tiny_run import make_config, sharded_model

NUM_POSITIONS = 192


def wide_config(folder: Path, precision: str, num_workers: int, **changes: Any) -> PlanConfig:
    shape = tiny_config(
        vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32, max_position_embeddings=256
    )
    run = {"micro_batch_rows": 4, "num_workers": num_workers, "cpus_per_worker": 1} | changes
    config = make_config(folder, model=shape.model_dump(), precision=precision, global_batch_rows=8, run=run)
    return PlanConfig.model_validate(config.model_dump())


def ids(num_rows: int, device: str) -> dict[str, torch.Tensor]:
    return dict.fromkeys(("inputs", "labels"), torch.ones(num_rows, NUM_POSITIONS, dtype=torch.long, device=device))


def foretell(config: PlanConfig) -> Memory:
    return make_plan(config, NUM_POSITIONS + 1).memory


def objective_of(config: TrainingConfig) -> Any:
    return partial(method_of(config.shape).objective, chunk_tokens=config.run.loss_chunk_tokens)


def allocate(config: TrainingConfig, folder: Path) -> int:
    """Most bytes that torch's CPU allocator held at one time, from before the model was made to after its second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model, optimizer = sharded_model(config)
        batch = ids(config.global_batch_rows // dist.get_world_size(), "cpu")
        for step in range(2):
            train_step(step, model, optimizer, Guard(config.optim), objective_of(config), batch, config.run)
    path = folder / f"trace-{dist.get_rank()}.json"
    profiled.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_workers", "changes"),
    [
        ("bfloat16", 2, {}),
        ("float32", 1, {"recompute": "full"}),
        ("float32", 1, {"recompute": "selective"}),
        ("float32", 1, {"loss_chunk_tokens": 96}),
    ],
)
def test_a_step_allocates_what_was_foretold_and_no_more(
    tmp_path: Path, precision: str, num_workers: int, changes: dict[str, Any]
) -> None:
    config = wide_config(tmp_path, precision, num_workers, **changes)

    measured = max(run_on_ranks(num_workers, allocate, config, tmp_path))

    foretold = foretell(config).total
    assert 0.8 * foretold < measured < foretold


@pytest.mark.gpu
def test_a_gpu_allocates_what_was_foretold_and_no_more(tmp_path: Path) -> None:
    config = wide_config(tmp_path, "bfloat16", 1)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = build_model(config, device)
        optimizer = make_optimizer(model, config.optim)
        for step in range(2):
            train_step(step, model, optimizer, Guard(config.optim), objective_of(config), ids(8, "cuda"), config.run)
        measured = torch.cuda.max_memory_allocated() - before
    finally:
        dist.destroy_process_group()

    foretold = foretell(config).total
    assert 0.7 * foretold < measured < 1.1 * foretold  # cuBLAS has a workspace of its own
