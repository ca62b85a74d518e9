"""Checkpoints of a run: `<folder>/step_XXXXXXXX`, a file for each rank, loadable by any number of ranks.

A checkpoint is written under another name and renamed when it is whole, so a folder called step_XXXXXXXX can be trusted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from powerhouse.errors import ArtifactError

_PREFIX = "step_"
_PARTIAL = ".partial"


def saved_steps(folder: Path) -> list[int]:
    """Steps done at each whole checkpoint, rising."""
    names = (item.name.removeprefix(_PREFIX) for item in folder.glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())


def latest_step(folder: Path) -> int:
    """Steps done at the newest whole checkpoint; 0 where there is none."""
    return max(saved_steps(folder), default=0)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write the state after `step` steps and drop all but the newest `keep`. A collective."""
    path = _path(folder, step)
    partial = path.with_suffix(_PARTIAL)
    if dist.get_rank() == 0:
        for remains in folder.glob(f"*{_PARTIAL}"):  # of a run that was killed while it wrote
            shutil.rmtree(remains)
    dist.barrier()
    state_dict_saver.save(_state(model, optimizer), checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(path)
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(_path(folder, old))
    dist.barrier()


def load(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimiser with the state after `step` steps; each rank reads its slices only. A collective.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    path = _path(folder, step)
    state = _state(model, optimizer)
    try:
        state_dict_loader.load(state, checkpoint_id=path)
    except (CheckpointException, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # the rest is every rank's traceback
        do = "delete it: the run then goes on from the one before it, or from the start"
        raise ArtifactError(f"{path}: damaged checkpoint", got=reason, do=do) from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}"


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}
