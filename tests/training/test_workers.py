"""Other numbers of workers, over gloo, with real kill -9: the batches stay the same to the row, and the losses to 1e-5."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from distributed import run_on_ranks
from powerhouse.training.checkpoint import whole_steps
from powerhouse.training.config import TrainingConfig
from powerhouse.training.objectives import Batch
from powerhouse.training.workers import shrink_group
from tiny_run import losses, make_config, run_loop, write_tokens

pytestmark = pytest.mark.slow


def config_in(folder: Path) -> TrainingConfig:
    write_tokens(folder / "tokens")
    return make_config(folder, global_batch_rows=12, num_steps=10, run={"num_workers": 3, "min_workers": 1})


def note(folder: Path, kill_at: int | None, step: int, batch: Batch) -> None:
    """Write down this rank's part of the step's batch; at the step to die at, wait for the checkpoint that is due, and die."""
    part = folder / f"{step}" / f"{dist.get_world_size()}"
    part.mkdir(parents=True, exist_ok=True)
    np.save(part / f"{dist.get_rank()}.npy", batch["inputs"].numpy())
    if step == kill_at and dist.get_rank() == dist.get_world_size() - 1:
        newest_due = step - step % 2
        while newest_due not in whole_steps(folder.parent / "model" / "checkpoints"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)


def batches_seen(folder: Path) -> list[set[bytes]]:
    """Of every step the global batch, as often as there were numbers of workers that made it."""
    steps = sorted(folder.iterdir(), key=lambda path: int(path.name))
    return [
        {b"".join(np.load(part).tobytes() for part in sorted(worlds.iterdir())) for worlds in step.iterdir()} for step in steps
    ]


def test_killed_at_random_steps_and_resumed_with_2_then_3_then_1_workers_every_batch_is_the_uninterrupted_runs(
    tmp_path: Path,
) -> None:
    whole, killed = config_in(tmp_path / "whole"), config_in(tmp_path / "killed")
    first, second = random.randrange(2, 5), random.randrange(5, 9)
    run_on_ranks(2, run_loop, whole, None, partial(note, tmp_path / "whole" / "batches", None))

    for num_workers, kill_at in ((2, first), (3, second)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_on_ranks(num_workers, run_loop, killed, None, partial(note, tmp_path / "killed" / "batches", kill_at))
        lost = kill_at - whole_steps(killed.checkpoints)[-1]
        assert lost < killed.run.checkpoint_every, f"killed at {kill_at} of {(first, second)}"
    assert run_on_ranks(1, run_loop, killed, None, partial(note, tmp_path / "killed" / "batches", None)) == [None]

    expected, got = batches_seen(tmp_path / "whole" / "batches"), batches_seen(tmp_path / "killed" / "batches")
    assert got == expected
    assert all(len(batches) == 1 for batches in expected)
    assert losses(killed)[: first - first % 2] == losses(whole)[: first - first % 2]  # to the bit while there are 2 workers
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-5)


def use(num_used: int) -> float | None:
    if not shrink_group(num_used):
        return None
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item() + 10 * dist.get_world_size()


def test_of_three_workers_two_that_can_share_the_batch_go_on_without_the_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = make_config(tmp_path, global_batch_rows=8)

    assert [config.usable_workers(number) for number in (1, 2, 3, 4, 5)] == [1, 2, 2, 4, 4]
    assert run_on_ranks(3, use, config.usable_workers(3)) == [23, 23, None]
    assert run_on_ranks(2, use, config.usable_workers(2)) == [23, 23]
