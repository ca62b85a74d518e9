"""The workers of a run: Ray Train starts, watches and replaces them. [Ray]"""

from __future__ import annotations

import os
import tempfile

import ray.exceptions
import ray.train

from powerhouse.errors import ClusterError, PowerhouseError, TrainingError
from powerhouse.session import connect
from powerhouse.telemetry import make_logger
from powerhouse.training.config import TrainingConfig
from powerhouse.training.stopping import StopSignal, mark_of_stop, marking_sigterm
from powerhouse.training.trainer import Trainer

# Ray's own 60 s is too short where an autoscaler must first start a node, or the workers' disk is cold.
_START_TIMEOUT_S = 1800


def run_workers(config: TrainingConfig) -> None:
    """Run `work.work` to its end, by new workers as often as those at work were asked to stop: that is no failure."""
    connect("train", shows_workers=True)
    run, fewest = config.run, config.run.min_workers or config.run.num_workers
    if fewest == run.num_workers:  # else Ray's time to start is up soon, and it counts anew how many there is room for
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    with marking_sigterm(mark_of_stop(config.output)):
        while isinstance(outcome := _run_group(config), str):
            if mark_of_stop(config.output).exists():
                do = "run the job again: it goes on from there"
                raise TrainingError("the job was told to end (SIGTERM)", got=outcome, do=do)
            make_logger("training").warning(
                "the workers were asked to stop: new ones go on", extra={"fields": {"why": outcome}}
            )
    if outcome is not None:
        raise outcome


def _run_group(config: TrainingConfig) -> PowerhouseError | str | None:
    """What all workers met at once, or why they all stopped early; lost ones are replaced, from the last checkpoint on."""
    run, fewest = config.run, config.run.min_workers or config.run.num_workers
    scaling = ray.train.ScalingConfig(
        num_workers=(fewest, run.num_workers) if fewest < run.num_workers else run.num_workers,
        use_gpu=run.use_gpu,
        resources_per_worker={"CPU": run.cpus_per_worker, "train": 0.001, **({"GPU": 1} if run.use_gpu else {})},
    )
    with tempfile.TemporaryDirectory(prefix="ray-train-") as own_records:  # Ray's state of the run is not what we resume from
        trainer = Trainer(
            config,
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
            outcome: PowerhouseError | str | None = trainer.fit().return_value
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
