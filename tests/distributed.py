"""Run a function on N processes joined by gloo, and bring back what each returns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return [function(*arguments) on rank 0, on rank 1, ...]; the function must be importable, so no lambda."""
    import_module("torch._dynamo")  # sharding imports it: here once, or for seconds in every process that is forked
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _enter, args=(num_ranks, folder, function, arguments), nprocs=num_ranks, start_method="fork"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _enter(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
