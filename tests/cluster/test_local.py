"""A real Ray head, started and ended as `make demo` does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerhouse.cluster.local import STATE_FILE, LocalCluster, LocalClusterConfig, read_state, running, start
from powerhouse.cluster.processes import find_free_port, find_processes
from powerhouse.errors import ClusterError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("POWERHOUSE_STORAGE", str(tmp_path_factory.mktemp("storage")))
        with running(LocalClusterConfig(dashboard_port=find_free_port())) as cluster:
            yield cluster
        assert find_processes(cluster.cluster_id) == []
        assert not Path(cluster.temp_dir).exists()
        assert read_state() is None


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text("import os, ray, sys\nray.init()\nopen(sys.argv[1], 'w').write(str(ray.cluster_resources()))\n")
    return path


def test_a_submitted_job_runs_where_all_three_groups_are(cluster: LocalCluster, job: Path, tmp_path: Path) -> None:
    cluster.submit(job, [str(tmp_path / "resources")])

    resources = (tmp_path / "resources").read_text()
    assert [name for name in ("data", "train", "serve") if f"'{name}': 1000.0" not in resources] == []


def test_a_failing_job_is_an_error_with_its_exit_status(cluster: LocalCluster, job: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"job.py failed\n  got: exit status 1"):
        cluster.submit(job, [str(tmp_path / "no" / "such" / "folder")])


def test_without_the_token_nobody_may_submit(cluster: LocalCluster) -> None:
    command = [f"{Path(sys.executable).parent}/ray", "job", "list", "--address", cluster.dashboard_url]
    stranger = subprocess.run(
        command, env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True
    )

    assert stranger.returncode != 0
    assert "auth" in (stranger.stdout + stranger.stderr).lower()


def test_a_second_cluster_on_its_port_or_its_storage_is_refused(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=f"port {cluster.dashboard_port} .* is already in use"):
        start(LocalClusterConfig(dashboard_port=cluster.dashboard_port), outlives_us=False)

    (tmp_path / STATE_FILE).write_text(json.dumps(cluster.__dict__))
    with pytest.raises(ClusterError, match="a cluster is already running here"):
        start(LocalClusterConfig(dashboard_port=find_free_port()), outlives_us=False)


def test_kill_9_of_its_owner_ends_the_whole_cluster(tmp_path: Path) -> None:
    code = (
        "import time; from powerhouse.cluster.local import *\n"
        f"with running(LocalClusterConfig(dashboard_port={find_free_port()})): print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        state = read_state()
        assert state is not None
        assert state.is_running
        owner.send_signal(signal.SIGKILL)

    deadline = time.monotonic() + 300
    while left := find_processes(state.cluster_id):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    state.stop()  # what `make down` does with a dead cluster: remove its files
    assert not Path(state.temp_dir).exists()
