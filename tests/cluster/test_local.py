"""A real Ray head, started and ended as `make demo` does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from powerhouse.cluster.local import STATE_FILE, LocalCluster, LocalClusterConfig, start
from powerhouse.cluster.processes import CLUSTER_VARIABLE, find_free_port, find_processes
from powerhouse.config import STORAGE_VARIABLE
from powerhouse.errors import ClusterError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


OWNER = """
import time
from powerhouse.cluster.local import LocalClusterConfig, running
with running(LocalClusterConfig(dashboard_port={port})):
    print("up", flush=True)
    time.sleep(6000)
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def owner(storage: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has started a cluster."""
    command = [sys.executable, "-c", OWNER.format(port=find_free_port())]
    environment = os.environ | {STORAGE_VARIABLE: str(storage)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        yield owner
        owner.kill()


@pytest.fixture(scope="module")
def cluster(owner: subprocess.Popen[bytes], storage: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(**json.loads((storage / STATE_FILE).read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield cluster
    cluster.stop()


def test_a_submitted_job_runs_where_all_three_groups_are(cluster: LocalCluster, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text("import ray, sys\nray.init()\nopen(sys.argv[1], 'w').write(str(ray.cluster_resources()))\n")

    cluster.submit(job, [str(tmp_path / "resources")])

    resources = (tmp_path / "resources").read_text()
    assert [name for name in ("data", "train", "serve") if f"'{name}': 1000.0" not in resources] == []


def test_a_job_server_that_does_not_answer_is_one_error(tmp_path: Path) -> None:
    lost = LocalCluster("lost", 0, str(tmp_path), find_free_port())
    with pytest.raises(ClusterError, match="Ray's job server refused the job or is lost"):
        lost.submit(tmp_path / "job.py", [])
    with pytest.raises(ClusterError, match="the dashboard does not tell Serve's status"):
        lost.serve_status()


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {'0' * 64}"}], ids=["no token", "another token"])
def test_without_the_token_nobody_may_submit(cluster: LocalCluster, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{cluster.dashboard_url}/api/jobs/", json={"entrypoint": "true"}, headers=headers)

    assert answer.status_code in (401, 403)
    assert "auth" in answer.text.lower()


def test_a_second_cluster_on_its_port_or_its_storage_is_refused(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=f"port {cluster.dashboard_port} .* is already in use"):
        start(LocalClusterConfig(dashboard_port=cluster.dashboard_port), outlives_us=False)

    (tmp_path / STATE_FILE).write_text(json.dumps(cluster.__dict__))
    with pytest.raises(ClusterError, match="a cluster is already running here"):
        start(LocalClusterConfig(dashboard_port=find_free_port()), outlives_us=False)


def is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "Agent" in "".join(process.cmdline())
    return False


def test_kill_9_of_its_owner_ends_the_cluster_and_stopping_it_then_leaves_nothing(
    owner: subprocess.Popen[bytes], cluster: LocalCluster
) -> None:
    assert cluster.is_running
    assert owner.poll() is None
    agents = [process for process in find_processes(cluster.cluster_id) if is_agent(process)]
    assert agents
    assert all(process.environ()[CLUSTER_VARIABLE] == cluster.cluster_id for process in agents)
    owner.send_signal(signal.SIGKILL)

    deadline = time.monotonic() + 300
    while left := [process for process in find_processes(cluster.cluster_id) if not is_agent(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    cluster.stop()  # as `make down` does: Ray's agents may take a minute to see that their node is gone
    assert find_processes(cluster.cluster_id) == []
    assert not Path(cluster.temp_dir).exists()
