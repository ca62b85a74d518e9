"""What each worker of a run does. [Ray]"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

import ray.train
import torch
import torch.distributed as dist
from ray.train._internal.utils import get_address_and_port
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from ray.train.torch.config import _set_torch_distributed_env_vars
from ray.util.metrics import Gauge as RayGauge

from powerhouse.artifacts import UNFINISHED
from powerhouse.device import reuse_freed_memory
from powerhouse.errors import ArtifactError, PowerhouseError, TrainingError
from powerhouse.telemetry import Gauge
from powerhouse.training.adapting import repeatable, save_trained
from powerhouse.training.build import build_model
from powerhouse.training.checkpoint import Checkpoints, StopRequest
from powerhouse.training.config import TrainingConfig
from powerhouse.training.data import read_batches
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer
from powerhouse.training.sharding import WholeState
from powerhouse.training.stopping import is_asked_to_stop, mark_of_stop
from powerhouse.training.watch import Watch
from powerhouse.training.workers import shrink_group

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def work_or_tell(config: TrainingConfig) -> PowerhouseError | str | None:
    """Return what all ranks meet at once, or why they all stop: raised, Ray would count a failure, and an error would recur.

    Another error is one rank's: it is raised, for the others wait for that rank, and Ray ends them.
    """
    outcome: PowerhouseError | str | None = None
    join_group()
    try:
        work(config)
    except (TrainingError, ArtifactError) as error:
        outcome = error
    except StopRequest as request:
        outcome = str(request)
    if dist.is_initialized():  # but for a worker that was one too many
        dist.destroy_process_group()
    return outcome


def join_group() -> None:
    """Join all workers of the run in torch's process group, as Ray's own TorchTrainer would."""
    is_first, device = ray.train.get_context().get_world_rank() == 0, get_device()
    address, port = broadcast_from_rank_zero(get_address_and_port() if is_first else None)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_COLLECTIVE_TIMEOUT)


def work(config: TrainingConfig) -> None:
    """What each worker does, in a process group that is there already."""
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(int(config.run.cpus_per_worker), 1))
        reuse_freed_memory(largest_bytes=1 << 30, most_bytes=(1 << 31) - 1)  # a step frees all its activations
    if not shrink_group(config.usable_workers(dist.get_world_size())):
        return
    method, model = method_of(config.shape), build_model(config, device)
    optimizer = make_optimizer(model, config.optim_of_trained)
    guard = Guard(config.optim, is_scaled=config.precision == "float16")
    objective = repeatable(config, partial(method.objective, chunk_tokens=config.run.loss_chunk_tokens))
    asked_to_stop = partial(is_asked_to_stop, mark_of_stop(config.output))
    run_id = (config.output / UNFINISHED).read_text(encoding="utf-8")
    with Checkpoints(config.checkpoints, run_id, config.run.keep_checkpoints, asked_to_stop) as checkpoints:
        start_step = checkpoints.resume(model, optimizer, guard)
        batches = read_batches(config, start_step, dist.get_rank(), dist.get_world_size(), device)
        with Watch(config, model, start_step, _ray_gauges()) as watch:
            train(model, optimizer, guard, objective, batches, config, start_step, watch, checkpoints)
    save_trained(config.output, config, WholeState(model), writes=dist.get_rank() == 0)


def _ray_gauges() -> Gauge:
    gauges: dict[str, RayGauge] = {}

    def set_gauge(name: str, value: float) -> None:
        if name not in gauges:
            gauges[name] = RayGauge(f"powerhouse_training_{name}", description=f"{name} of the newest training step")
        gauges[name].set(value)

    return set_gauge
