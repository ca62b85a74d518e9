"""Run a function on N processes joined by gloo, and bring back what each returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Loaded once, by the process that every rank is forked from: it has no threads, unlike one that runs tests.
LIBRARIES = [
    "pytest",
    "pandas",
    "transformers",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
]
TRAINING = [f"powerhouse.training.{name}" for name in ("adapting", "checkpoint", "loop", "watch")]
multiprocessing.set_forkserver_preload([*LIBRARIES, *TRAINING])


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return [function(*arguments) on rank 0, on rank 1, ...]; the function must be importable, so no lambda."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _enter,
            args=(num_ranks, folder, dict(os.environ), _StandardError(), function, arguments),
            nprocs=num_ranks,
            start_method="forkserver",
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


class _StandardError:
    """Where a test looks for what is said; unpickled it is the file's number in the new process."""

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _number, (DupFd(2),)


def _number(file: Any) -> int:
    number: int = file.detach()
    return number


def _enter(
    rank: int,
    num_ranks: int,
    folder: str,
    environment: Mapping[str, str],
    stderr: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    os.dup2(stderr, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
