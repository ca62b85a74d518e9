"""The job for real, on a cluster of several raylets: a job, a worker and a node killed with -9, a node that is taken away,
a job and a worker told to end, memory that runs short.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from distributed import run_on_ranks
from fakes import tiny_config, write_tiny_model
from powerhouse.artifacts import Artifact
from powerhouse.models.hub import load_model
from powerhouse.telemetry import read_metrics
from powerhouse.training.checkpoint import whole_steps
from powerhouse.training.config import TrainingConfig, read_shape
from powerhouse.training.objectives import Batch
from powerhouse.training.watch import METRICS, STARTS
from tiny_run import losses, make_config, run_loop, write_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOB = Path(__file__).parents[2] / "jobs" / "train_model.py"
NUM_STEPS, EVERY = 140, 10
GIB = 2**30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 2}
    quick["prestart_worker_first_driver"] = False  # workers that no run would use
    head = {"num_cpus": 2, "resources": {"data": 1, "serve": 1}, "include_dashboard": False, "_system_config": quick}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", temporary)  # else this would be the cluster of whoever looks for one by "auto"
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Any:
    return add_node(cluster)


def add_node(cluster: Cluster, num_workers: int = 2, **variables: str) -> Any:
    return cluster.add_node(num_cpus=num_workers, resources={"train": 1000}, env_vars=variables)


def short_of_memory() -> dict[str, str]:
    """Tell a node to kill its workers once the machine has 6 GiB less to give than now.

    That is some more than a run and what else the machine does take.
    """
    most = min((get_used_memory() + 6 * GIB) / get_system_memory(), 0.9)
    return {"RAY_memory_usage_threshold": str(most), "RAY_memory_monitor_refresh_ms": "100"}


def config_in(folder: Path, **changes: Any) -> TrainingConfig:
    write_tokens(folder / "tokens")
    run = {"checkpoint_every": EVERY, "cpus_per_worker": 1, "micro_batch_rows": 4} | changes.pop("run", {})
    return make_config(folder, run=run, **{"num_steps": NUM_STEPS, **changes})


@contextlib.contextmanager
def job(config: TrainingConfig, address: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start the job as a user does."""
    folder = config.output.parent
    path = folder / "job.yaml"
    path.write_text(config.model_dump_json())
    quick = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    environment = os.environ | {"RAY_ADDRESS": address, "TMPDIR": str(folder)} | quick | variables
    with (folder / "job.log").open("a") as log:
        command = [sys.executable, str(JOB), "--config", str(path)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


RAY_IS_SLOW = re.compile(r"[^\n]*Failed to send resource request.*?GetTimeoutError[^\n]*\n", re.DOTALL)
"""Its own warning, with a traceback, where a busy processor keeps it waiting for five seconds."""


def said(config: TrainingConfig) -> str:
    return (config.output.parent / "job.log").read_text()


def num_done(config: TrainingConfig) -> int:
    return len(read_metrics(config.output / METRICS))


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], config: TrainingConfig) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None, said(config)
        assert time.monotonic() < deadline, said(config)
        time.sleep(0.1)  # some steps of a run


def training_workers(node: Any) -> list[psutil.Process]:
    return [process for process in processes(node) if is_training_worker(process)]


def processes(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def is_training_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def starts(config: TrainingConfig) -> list[tuple[int, int]]:
    """Of each start of the run its step and the number of its workers."""
    return [(line["step"], line["workers"]) for line in read_metrics(config.output / STARTS) if "step" in line]


@pytest.fixture(scope="module")
def failed(cluster: Cluster, node: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingConfig]:
    """Give two runs, side by side, that cannot end well: one of two workers, one of a model that none can hold."""
    huge = tiny_config(num_hidden_layers=2, vocab_size=2**36).model_dump()
    configs = {
        "lr": config_in(tmp_path_factory.mktemp("lr"), optim={"lr": 1e30}, run={"cpus_per_worker": 0.5}),
        "model": config_in(
            tmp_path_factory.mktemp("model"),
            model=huge,
            run={"num_workers": 1, "max_failures": 0, "cpus_per_worker": 0.5},
        ),
    }
    with contextlib.ExitStack() as jobs:
        started = {name: jobs.enter_context(job(config, cluster.address)) for name, config in configs.items()}
        assert {name: process.wait() for name, process in started.items()} == {"lr": 2, "model": 2}
    return configs


def test_a_loss_that_is_no_number_is_one_error_of_all_workers_and_is_not_retried(failed: dict[str, TrainingConfig]) -> None:
    config = failed["lr"]

    assert said(config).count("error: step 1: the loss or its gradient is not a number") == 1
    assert "Traceback" not in RAY_IS_SLOW.sub("", said(config))
    assert starts(config) == [(0, 2)]
    assert num_done(config) == 1
    assert not (config.output / "manifest.json").exists()


def test_a_model_that_no_worker_can_hold_is_one_error_that_says_so(failed: dict[str, TrainingConfig]) -> None:
    config = failed["model"]

    assert "error: a worker ran out of memory once" in said(config)
    assert "do: lower run.micro_batch_rows" in said(config)


@dataclass(frozen=True)
class Struck:
    """A run of an adapter that was struck in every way, and what was seen of it meanwhile."""

    config: TrainingConfig
    num_done_at_kill: int
    said_at_sigterm: str


@pytest.fixture(scope="module")
def struck(cluster: Cluster, node: Any, tmp_path_factory: pytest.TempPathFactory) -> Struck:
    config = adapter_config_in(tmp_path_factory.mktemp("struck"))
    small = add_node(cluster, 1)
    # Ray waits this long for the workers that there is no room for any more.
    quickly = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
    with job(with_run(config, min_workers=1), cluster.address, **quickly) as process:
        strike_in_turn(config, process, node, tell_one_to_end, partial(give_notice, cluster))
        wait_until(lambda: is_going(config, 3) and newest_checkpoint(config) > starts(config)[2][0], process, config)
        process.send_signal(signal.SIGKILL)
    num_done_at_kill = num_done(config)
    assert not (config.output / "manifest.json").exists()

    for one in (node, small):
        cluster.remove_node(one, allow_graceful=False)
    # Saved at the signal and at the end: every start after one is from there.
    config = with_run(config, checkpoint_every=1000, max_failures=3)
    with job(config, cluster.address) as process:
        strikes = (fill_memory, kill_one, partial(replace_node, cluster))
        strike_in_turn(config, process, add_node(cluster, **short_of_memory()), *strikes)
        wait_until(lambda: is_going(config, 7), process, config)
        process.terminate()
        assert process.wait() == 2, said(config)
    said_at_sigterm = said(config)
    with job(config, cluster.address) as process:
        assert process.wait() == 0, said(config)
    return Struck(config, num_done_at_kill, said_at_sigterm)


def adapter_config_in(folder: Path) -> TrainingConfig:
    base = write_tiny_model(folder / "base", num_hidden_layers=2)
    adapter = {"kind": "lora", "rank": 2, "merges": True}
    return config_in(folder, model=None, start_from=base, adapter=adapter, optim={"lr": 0.003})


def with_run(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def newest_checkpoint(config: TrainingConfig) -> int:
    return max(whole_steps(config.checkpoints), default=0)


def give_notice(cluster: Cluster, node: Any) -> None:
    """Tell Ray that the node is to be taken away in a minute, as `ray drain-node` does."""
    deadline_ms = int((time.time() + 60) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    is_accepted, why_not = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", deadline_ms)
    assert is_accepted, why_not


def test_a_job_a_worker_and_a_node_killed_or_told_to_end_and_short_memory_leave_the_losses_of_a_run_without_ray_to_the_bit(
    struck: Struck, tmp_path: Path
) -> None:
    """And so does a node that is taken away after a notice: the run saves, and goes on with fewer workers."""
    (_, of_worker, of_notice, resumed, *_, of_job), _ = zip(*starts(struck.config), strict=True)
    assert starts(struck.config) == [(0, 2), (of_worker, 2), (of_notice, 1), *[(resumed, 2)] * 4, (of_job, 2)]
    assert 5 < of_worker < of_notice - 5 < resumed - 5 <= struck.num_done_at_kill - 5
    assert resumed % EVERY == 0
    assert resumed + 5 < of_job < NUM_STEPS - 10
    told = f"error: the job was told to end (SIGTERM)\n  got: asked to stop; saved after {of_job} steps"
    assert told in struck.said_at_sigterm

    whole = read_shape(adapter_config_in(tmp_path))
    for num_ranks, end in ((2, of_notice), (1, resumed)):
        stopped = f"StopRequest: asked to stop; saved after {end} steps"
        assert run_on_ranks(num_ranks, run_loop, whole, None, partial(is_last_before, end)) == [stopped] * num_ranks
    assert run_on_ranks(2, run_loop, whole) == [None] * 2
    assert losses(struck.config) == losses(whole)


def is_last_before(num_done: int, step: int, batch: Batch) -> bool:
    return step == num_done - 1


def test_an_adapter_is_an_artifact_of_its_own_with_the_merged_model_beside_it(struck: Struck) -> None:
    base, done = struck.config.start_from, Artifact.open(struck.config.output, "adapter")

    assert done.manifest.counts["steps"] == NUM_STEPS
    assert done.manifest.counts["tokens_seen"] == NUM_STEPS * 8 * 16
    assert done.manifest.counts["trained_parameters"] < done.manifest.counts["parameters"] / 5
    ids_BT, positions_T = torch.arange(16).unsqueeze(0), torch.arange(16)
    adapted, merged = load_model(base, adapter=done.path), load_model(done.path / "merged")
    torch.testing.assert_close(merged(ids_BT, positions_T), adapted(ids_BT, positions_T), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(ids_BT, positions_T), load_model(base)(ids_BT, positions_T), atol=1e-2)


def strike_in_turn(
    config: TrainingConfig, process: subprocess.Popen[str], node: Any, *strikes: Callable[[Any], object]
) -> None:
    """Strike each start of the job once it is going."""
    before = len(starts(config))
    for number, strike in enumerate(strikes, start=before + 1):
        wait_until(partial(is_going, config, number), process, config)
        strike(node)


def is_going(config: TrainingConfig, number: int) -> bool:
    """Whether that start, counted from one, has done five steps."""
    return len(starts(config)) == number and num_done(config) > starts(config)[-1][0] + 5


def tell_one_to_end(node: Any) -> None:
    training_workers(node)[0].terminate()


def fill_memory(node: Any) -> None:
    """Take memory until Ray has killed a worker for it, and give it back; no step is done meanwhile."""
    workers, taken = training_workers(node), []
    for worker in workers:
        worker.suspend()
    while all(is_training_worker(worker) for worker in workers):
        # Filled at once: the large pages that numpy asks for took the system 20 s to find, where memory is in pieces.
        taken.append(mmap.mmap(-1, GIB // 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
        assert len(taken) < 100, "Ray did not mind 25 GiB"
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()


def kill_one(node: Any) -> None:
    training_workers(node)[-1].kill()


def replace_node(cluster: Cluster, node: Any) -> None:
    for one in processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):  # those of a raylet that is gone end by themselves
            one.kill()
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)
