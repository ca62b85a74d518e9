"""The job for real, on a cluster of several raylets: a job, a worker and a node killed with -9, a node that is taken away."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from distributed import run_on_ranks
from fakes import tiny_config, write_tiny_model
from powerhouse.artifacts import Artifact
from powerhouse.models.hub import load_model
from powerhouse.telemetry import read_metrics
from powerhouse.training.checkpoint import whole_steps
from powerhouse.training.config import TrainingConfig
from powerhouse.training.watch import METRICS, STARTS
from tiny_run import losses, make_config, run_loop, write_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOB = Path(__file__).parents[2] / "jobs" / "train_model.py"
NUM_STEPS, EVERY = 150, 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 2}
    head = {"num_cpus": 2, "resources": {"data": 1, "serve": 1}, "include_dashboard": False, "_system_config": quick}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", temporary)  # else this would be the cluster of whoever looks for one by "auto"
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


def add_training_node(cluster: Cluster, num_workers: int = 1) -> Any:
    return cluster.add_node(num_cpus=num_workers, resources={"train": 1000})


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Any:
    """Give a node with room for two workers."""
    return add_training_node(cluster, 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """Give a run of two ranks without Ray that nothing interrupted."""
    config = config_in(tmp_path_factory.mktemp("whole"))
    assert run_on_ranks(2, run_loop, config) == [None, None]
    return config


def config_in(folder: Path, **changes: Any) -> TrainingConfig:
    write_tokens(folder / "tokens")
    run = {"checkpoint_every": EVERY, "cpus_per_worker": 1} | changes.pop("run", {})
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


def said(config: TrainingConfig) -> str:
    return (config.output.parent / "job.log").read_text()


def num_done(config: TrainingConfig) -> int:
    return len(read_metrics(config.output / METRICS))


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], config: TrainingConfig) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None, said(config)
        assert time.monotonic() < deadline, said(config)
        time.sleep(0.02)


def training_workers(node: Any) -> list[psutil.Process]:
    return [process for process in processes(node) if is_training_worker(process)]


def processes(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def is_training_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def test_an_elastic_run_that_loses_a_node_to_a_notice_saves_and_goes_on_with_fewer_workers(
    whole: TrainingConfig, cluster: Cluster, tmp_path: Path
) -> None:
    nodes = [add_training_node(cluster), add_training_node(cluster)]
    config = config_in(tmp_path, run={"checkpoint_every": 1000, "min_workers": 1})  # saved at the notice and at the end

    # Ray waits this long for the workers that there is no room for any more.
    with job(config, cluster.address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20") as process:
        wait_until(lambda: num_done(config) > 12, process, config)
        give_notice(cluster, nodes[1])
        wait_until(lambda: whole_steps(config.checkpoints) != [], process, config)
        [saved] = whole_steps(config.checkpoints)
        code = process.wait()
    for one in nodes:  # the tests after this one have a node of their own
        cluster.remove_node(one, allow_graceful=False)

    assert code == 0, said(config)
    assert starts(config) == [(0, 2), (saved, 1)]
    assert 12 < saved < NUM_STEPS
    assert losses(config) == pytest.approx(losses(whole), abs=1e-5)


def give_notice(cluster: Cluster, node: Any) -> None:
    """Tell Ray that the node is to be taken away in a minute, as `ray drain-node` does."""
    deadline_ms = int((time.time() + 60) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    is_accepted, why_not = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", deadline_ms)
    assert is_accepted, why_not


def starts(config: TrainingConfig) -> list[tuple[int, int]]:
    """Of each start of the run its step and the number of its workers."""
    return [(line["step"], line["workers"]) for line in read_metrics(config.output / STARTS) if "step" in line]


def test_a_job_then_a_worker_killed_with_minus_9_leave_the_losses_of_a_run_without_ray_to_the_bit(
    whole: TrainingConfig, cluster: Cluster, node: Any, tmp_path: Path
) -> None:
    config = config_in(tmp_path)

    with job(config, cluster.address) as process:
        wait_until(lambda: num_done(config) > 15, process, config)
        process.send_signal(signal.SIGKILL)
    at_job_kill = num_done(config)
    assert not (config.output / "manifest.json").exists()
    with job(config, cluster.address) as process:
        wait_until(lambda: num_done(config) > at_job_kill + 15, process, config)
        training_workers(node)[-1].kill()
        code = process.wait()

    assert code == 0, said(config)
    assert 15 < at_job_kill < NUM_STEPS - 30
    assert losses(config) == losses(whole)
    artifact = Artifact.open(config.output, "model")
    assert artifact.manifest.counts["steps"] == NUM_STEPS
    assert artifact.manifest.counts["tokens_seen"] == NUM_STEPS * 8 * 16


def test_a_loss_that_is_no_number_is_our_error_and_is_not_retried(cluster: Cluster, node: Any, tmp_path: Path) -> None:
    config = config_in(tmp_path, optim={"lr": 1e30})

    with job(config, cluster.address) as process:
        assert process.wait() == 2, said(config)

    assert "error: step 1: the loss or its gradient is not a number" in said(config)
    assert num_done(config) == 1
    assert not (config.output / "manifest.json").exists()


def test_an_adapter_is_an_artifact_of_its_own_with_the_merged_model_beside_it(
    cluster: Cluster, node: Any, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base", num_hidden_layers=2)
    adapter = {"kind": "lora", "rank": 2, "merges": True}
    config = config_in(tmp_path, num_steps=6, model=None, start_from=base, adapter=adapter)

    with job(config, cluster.address) as process:
        assert process.wait() == 0, said(config)

    done = Artifact.open(config.output, "adapter")
    assert done.manifest.counts["trained_parameters"] < done.manifest.counts["parameters"] / 5
    ids_BT, positions_T = torch.arange(16).unsqueeze(0), torch.arange(16)
    adapted, merged = load_model(base, adapter=done.path), load_model(done.path / "merged")
    torch.testing.assert_close(merged(ids_BT, positions_T), adapted(ids_BT, positions_T), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(ids_BT, positions_T), load_model(base)(ids_BT, positions_T), atol=1e-2)


def test_a_model_that_no_worker_can_hold_is_one_error_that_says_so(cluster: Cluster, node: Any, tmp_path: Path) -> None:
    shape = tiny_config(num_hidden_layers=2, vocab_size=2**36).model_dump()
    config = config_in(tmp_path, model=shape, run={"max_failures": 0})

    with job(config, cluster.address) as process:
        assert process.wait() == 2, said(config)

    assert "error: a worker ran out of memory once" in said(config)
    assert "do: lower run.micro_batch_rows" in said(config)


def test_a_worker_told_to_end_and_a_node_killed_with_minus_9_leave_the_losses_of_a_run_without_ray_to_the_bit(
    whole: TrainingConfig, cluster: Cluster, node: Any, tmp_path: Path
) -> None:
    config = config_in(tmp_path, run={"checkpoint_every": 1000})  # saved at the signal and at the end

    with job(config, cluster.address) as process:
        wait_until(lambda: num_done(config) > 12, process, config)
        training_workers(node)[0].terminate()
        wait_until(lambda: len(starts(config)) > 1 and num_done(config) > starts(config)[1][0] + 15, process, config)
        for one in processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):  # those of a raylet that is gone end by themselves
                one.kill()
        cluster.remove_node(node, allow_graceful=False)
        add_training_node(cluster, 2)
        code = process.wait()

    assert code == 0, said(config)
    saved = starts(config)[1][0]
    assert starts(config) == [(0, 2), (saved, 2), (saved, 2)]
    assert 12 < saved < NUM_STEPS - 15
    assert losses(config) == losses(whole)
