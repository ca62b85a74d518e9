"""Training as a job: Ray Train starts, watches and replaces the workers. [Ray]

All that a run needs to go on lies in its own folder; nothing is left to Ray's records.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import ray.exceptions
import ray.train
import torch
import torch.distributed as dist
from ray.train._internal.utils import get_address_and_port
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from ray.train.torch.config import _set_torch_distributed_env_vars
from ray.util.metrics import Gauge as RayGauge

from powerhouse import artifacts
from powerhouse.artifacts import UNFINISHED, Artifact, Counts
from powerhouse.device import computes_bfloat16, reuse_freed_memory
from powerhouse.errors import ArtifactError, ClusterError, PowerhouseError, TrainingError
from powerhouse.session import connect
from powerhouse.telemetry import Gauge, make_logger, read_metrics
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.adapting import repeatable, save_trained
from powerhouse.training.build import build_model, empty_model
from powerhouse.training.checkpoint import Checkpoints, StopRequest
from powerhouse.training.config import TrainingConfig, check, read_shape
from powerhouse.training.data import masks_documents, read_batches
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer
from powerhouse.training.rows import check_rows
from powerhouse.training.sharding import WholeState
from powerhouse.training.stopping import StopSignal, is_asked_to_stop, marking_sigterm
from powerhouse.training.summary import write_summary
from powerhouse.training.trainer import Trainer
from powerhouse.training.watch import METRICS, Watch, check_watch
from powerhouse.training.workers import shrink_group


def train_model(config: TrainingConfig) -> Artifact:
    """Train, or go on from the last checkpoint of the same run; leave a Hugging Face model directory.

    Raises:
        ConfigError: the settings do not fit each other or the tokens.
        TrainingError: the loss is not a number, the job was told to end, or workers were lost more often than
            `run.max_failures`.
    """
    tokens = Artifact.open(config.tokens, "tokens")
    config = read_shape(config)
    check(config, tokens)
    check_rows(config, tokens)
    check_watch(config)
    if config.precision == "auto":
        is_fast = computes_bfloat16("cuda" if config.run.use_gpu else "cpu")
        config = config.model_copy(update={"precision": "bfloat16" if is_fast else "float32"})
    tells_learned = "num_learned_tokens" in tokens.manifest.counts
    config = config.model_copy(update={"masks_documents": masks_documents(config, tells_learned=tells_learned)})
    settings = config.model_dump(mode="json", exclude={"tokens", "output", "run", "watch", "start_from"})
    inputs: dict[str, Artifact | str] = {"tokens": tokens}
    if config.start_from:
        inputs["start_from"] = artifacts.identify(config.start_from, "model")
    make = partial(_make, config=config, row_length=int(tokens.manifest.counts["row_length"]))
    kind = "adapter" if config.adapter else "model"
    return artifacts.produce(config.output, kind, settings, inputs, make, can_resume=True)


def _make(folder: Path, config: TrainingConfig, row_length: int) -> Counts:
    _run_workers(config)
    method, tokenizer = method_of(config.shape), Tokenizer.load(config.tokens)
    tokenizer.add_special_tokens(config.make_noise(tokenizer, row_length).special_tokens)
    tokenizer.save(folder)
    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_summary(folder, config, Artifact.open(config.tokens, "tokens"), parameters)
    rows = read_metrics(folder / METRICS)
    last = [row["loss"] for row in rows[-max(len(rows) // 10, 1) :]]
    return {
        "parameters": parameters,
        **({"trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)} if config.adapter else {}),
        "steps": config.num_steps,
        "tokens_seen": config.num_steps * config.global_batch_rows * method.num_positions(row_length),
        "skipped_steps": int(sum(row["skipped"] for row in rows)),
        **({"final_loss": round(sum(last) / len(last), 4)} if last else {}),  # unless the log was lost, and not the checkpoint
    }


# Ray's own 60 s is too short where an autoscaler must first start a node, or the workers' disk is cold.
_START_TIMEOUT_S = 1800
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def _run_workers(config: TrainingConfig) -> None:
    """Run `work` to its end, by new workers as often as those at work were asked to stop: that is no failure."""
    connect("train", shows_workers=True)
    run, fewest = config.run, config.run.min_workers or config.run.num_workers
    if fewest == run.num_workers:  # else Ray's time to start is up soon, and it counts anew how many there is room for
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    with marking_sigterm(_mark_of_stop(config)):
        while isinstance(outcome := _run_group(config), StopRequest):
            if _mark_of_stop(config).exists():
                do = "run the job again: it goes on from there"
                raise TrainingError("the job was told to end (SIGTERM)", got=outcome, do=do)
            make_logger("training").warning(
                "the workers were asked to stop: new ones go on", extra={"fields": {"why": str(outcome)}}
            )
    if outcome is not None:
        raise outcome


def _mark_of_stop(config: TrainingConfig) -> Path:
    """In the folder that every node sees."""
    return config.output / "stop"


def _run_group(config: TrainingConfig) -> PowerhouseError | StopRequest | None:
    """What all workers met at once, if anything; lost ones are replaced, and the new group goes on from the last checkpoint."""
    run, fewest = config.run, config.run.min_workers or config.run.num_workers
    scaling = ray.train.ScalingConfig(
        num_workers=(fewest, run.num_workers) if fewest < run.num_workers else run.num_workers,
        use_gpu=run.use_gpu,
        resources_per_worker={"CPU": run.cpus_per_worker, "train": 0.001, **({"GPU": 1} if run.use_gpu else {})},
    )
    with tempfile.TemporaryDirectory(prefix="ray-train-") as own_records:  # Ray's state of the run is not what we resume from
        trainer = Trainer(
            partial(_work_or_tell, config),  # as its `train_loop_config`, Ray's controller would load all that the config needs
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name="run",
                storage_path=own_records,
                failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
                callbacks=[StopSignal()],
                # Ray trains in a thread: without this, one with heaps of 64 MB, which are given back whenever they are empty.
                worker_runtime_env={} if run.use_gpu else {"env_vars": {"MALLOC_ARENA_MAX": "1"}},
            ),
        )
        try:
            outcome: PowerhouseError | StopRequest | None = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise _explain(error, run.max_failures) from error
        except ray.exceptions.RayError as error:
            raise ClusterError("the cluster was lost", got=error, do="run the job again when it is back") from error
    return outcome


_OUT_OF_MEMORY = ("OutOfMemory", "MemoryError", "out of memory", "can't allocate memory", "low on memory")


def _explain(error: ray.train.TrainingFailedError, max_failures: int) -> PowerhouseError:
    failures = list(error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else []
    if own := next((failure for failure in failures if isinstance(failure, PowerhouseError)), None):
        return own
    is_started, often = (
        not isinstance(error, ray.train.ControllerError),
        f"{max_failures + 1} times" if max_failures else "once",
    )
    if any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return TrainingError(
            f"a worker ran out of memory {often if is_started else 'while it started'}",
            got=_line_of_memory(error),
            do="lower run.micro_batch_rows, set run.recompute=full, or raise run.num_workers to shard the model over more"
            if is_started
            else "see what else takes the memory of the nodes, and run the job again: it goes on from the last checkpoint",
        )
    if not is_started:
        return ClusterError("the workers could not be started", got=error, do="see `ray status` for what is free")
    return TrainingError(f"workers failed {often}", got=error, do="run the job again: it goes on from the last checkpoint")


def _line_of_memory(error: Exception) -> str:
    """The line that names the memory: Ray's own of a node, or the last of a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in _OUT_OF_MEMORY)]
    return next((line for line in lines if "low on memory" in line), lines[-1])


def _work_or_tell(config: TrainingConfig) -> PowerhouseError | StopRequest | None:
    """Return what all ranks meet at once: raised, Ray would count a failure, and new workers would meet an error again.

    Another error is one rank's: it is raised, for the others wait for that rank, and Ray ends them.
    """
    outcome: PowerhouseError | StopRequest | None = None
    join_group()
    try:
        work(config)
    except (TrainingError, ArtifactError, StopRequest) as error:
        outcome = error
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
    asked_to_stop = partial(is_asked_to_stop, _mark_of_stop(config))
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
