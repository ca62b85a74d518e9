"""The job for real: Ray Train workers, a job killed with -9, a worker killed with -9."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch

from fakes import write_tiny_model
from powerhouse.artifacts import Artifact
from powerhouse.errors import TrainingError
from powerhouse.models.hub import load_model
from powerhouse.telemetry import read_metrics
from powerhouse.training.config import TrainingConfig
from powerhouse.training.launch import train_model
from powerhouse.training.watch import METRICS
from tiny_run import make_config, write_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

JOB = Path(__file__).parents[2] / "jobs" / "train_model.py"
NUM_STEPS = 120


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    groups = {"data": 1000, "train": 1000, "serve": 1000}
    context = ray.init(address="local", num_cpus=8, resources=groups, include_dashboard=False, _temp_dir=temporary)
    yield str(context.address_info["gcs_address"])
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def uninterrupted(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_tokens(folder / "tokens")
    return train_model(long_config(folder))


def long_config(folder: Path) -> TrainingConfig:
    return make_config(folder, num_steps=NUM_STEPS, run={"checkpoint_every": 20})


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / METRICS)]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@contextlib.contextmanager
def job(config: TrainingConfig, folder: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    path = folder / "job.yaml"
    path.write_text(config.model_dump_json())
    environment = os.environ | {"RAY_ADDRESS": address, "TMPDIR": str(folder)}
    with (folder / "job.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, str(JOB), "--config", str(path)], env=environment, stdout=log, stderr=log, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_run_leaves_a_finished_model_artifact_and_is_skipped_the_second_time(uninterrupted: Artifact) -> None:
    counts = uninterrupted.manifest.counts
    config = long_config(uninterrupted.path.parent)
    before = (uninterrupted.path / "manifest.json").stat().st_mtime_ns

    again = train_model(config.model_copy(update={"run": config.run.model_copy(update={"num_workers": 1})}))

    assert counts["steps"] == NUM_STEPS
    assert counts["tokens_seen"] == NUM_STEPS * 8 * 16
    assert len(losses(uninterrupted.path)) == NUM_STEPS
    assert again.manifest == uninterrupted.manifest
    assert (uninterrupted.path / "manifest.json").stat().st_mtime_ns == before
    assert not list(uninterrupted.path.glob("checkpoints/*/*.tmp"))


def test_a_job_killed_with_minus_9_is_finished_by_the_next_one_with_the_same_losses_to_the_bit(
    uninterrupted: Artifact, ray_address: str, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens")
    config = long_config(tmp_path)

    with job(config, tmp_path, ray_address) as process:
        wait_until(lambda: len(losses(config.output)) > 30)
        process.send_signal(signal.SIGKILL)
    num_done = len(losses(config.output))
    assert not (config.output / "manifest.json").exists()
    with job(config, tmp_path, ray_address) as process:
        code = process.wait()

    assert 30 < num_done < NUM_STEPS
    assert code == 0, (tmp_path / "job.log").read_text()
    assert losses(config.output) == losses(uninterrupted.path)


def test_a_worker_killed_with_minus_9_is_replaced_and_the_losses_are_the_same_to_the_bit(
    uninterrupted: Artifact, ray_address: str, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens")
    config = long_config(tmp_path)

    with job(config, tmp_path, ray_address) as process:
        wait_until(lambda: len(losses(config.output)) > 30)
        workers = [p for p in psutil.process_iter(["cmdline"]) if is_training_worker(p, ray_address)]
        workers[-1].kill()
        code = process.wait()

    assert code == 0, (tmp_path / "job.log").read_text()
    assert losses(config.output) == losses(uninterrupted.path)


def is_training_worker(process: psutil.Process, address: str) -> bool:
    """Of this test's cluster: other clusters of the machine are none of its business."""
    with contextlib.suppress(psutil.Error):
        is_ours = any(f"gcs_address={address}" in argument or address in argument for argument in parent_command(process))
        return bool(process.info["cmdline"]) and "RayTrainWorker" in process.info["cmdline"][0] and is_ours
    return False


def parent_command(process: psutil.Process) -> list[str]:
    parent = process.parent()
    return parent.cmdline() if parent else []


def test_a_loss_that_is_no_number_is_our_error_and_is_not_retried(ray_address: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    config = make_config(tmp_path, optim={"lr": 1e30})

    with pytest.raises(TrainingError, match="step 1: the loss or its gradient is not a number"):
        train_model(config)

    assert len(losses(config.output)) == 1
    assert json.loads((config.tokens / "manifest.json").read_text())["kind"] == "tokens"
    assert not (config.output / "manifest.json").exists()


def test_an_adapter_is_an_artifact_of_its_own_with_the_merged_model_beside_it(ray_address: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    base = write_tiny_model(tmp_path / "base", num_hidden_layers=2)
    adapter = {"kind": "lora", "rank": 2, "merges": True}

    done = train_model(make_config(tmp_path, model=None, start_from=base, adapter=adapter))

    assert done.manifest.kind == "adapter"
    assert done.manifest.counts["trained_parameters"] < done.manifest.counts["parameters"] / 5
    ids_BT, positions_T = torch.arange(16).unsqueeze(0), torch.arange(16)
    adapted, merged = load_model(base, adapter=done.path), load_model(done.path / "merged")
    torch.testing.assert_close(merged(ids_BT, positions_T), adapted(ids_BT, positions_T), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(ids_BT, positions_T), load_model(base)(ids_BT, positions_T), atol=1e-2)
