"""The cluster of `cluster.yaml` on one machine: a Ray head that carries all three groups' resources. [Ray]

It is driven as a real cluster is: by `ray start`, `serve deploy`, and what stands behind `ray job submit` and `serve status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from pydantic import Field

from powerhouse.artifacts import write_atomically
from powerhouse.cluster.processes import CLUSTER_VARIABLE, check_port_is_free, end_processes, find_free_port, find_processes
from powerhouse.config import STORAGE_VARIABLE, Config, storage_root
from powerhouse.errors import ClusterError
from powerhouse.job import CHECK

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STATE_FILE = "cluster.json"
_START_TIMEOUT_S = 300.0
_STATUS_TIMEOUT_S = 60.0


class LocalClusterConfig(Config):
    """A Ray head on this machine."""

    dashboard_port: int = Field(default=8265, gt=0, lt=65536)
    """Ray's dashboard and job server."""
    num_cpus: int = Field(default=8, gt=0)
    """Logical CPUs that jobs may ask for; they share the machine's cores."""
    object_store_mib: int = Field(default=1024, ge=80)
    """Shared memory for data on its way between processes."""


@dataclass(frozen=True)
class LocalCluster:
    """A running head, as its state file tells of it."""

    cluster_id: str
    head_pid: int
    temp_dir: str
    dashboard_port: int

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def is_running(self) -> bool:
        return any(process.pid == self.head_pid for process in find_processes(self.cluster_id))

    def submit(self, job: Path, arguments: Sequence[str]) -> None:
        """Run a job to its end, its log shown here.

        Raises:
            ClusterError: it ended with an error, which its log names, or Ray's job server refused it or was lost.
        """
        done = self._run_job(shlex.join(["python", str(job), *arguments]))
        if done.status != "SUCCEEDED":
            reason = done.message if done.driver_exit_code is None else f"exit status {done.driver_exit_code}"
            raise ClusterError(f"{job} failed", got=reason, do="read the job's log above")

    def _run_job(self, entrypoint: str) -> JobDetails:
        import aiohttp
        from ray.job_submission import JobSubmissionClient  # takes a second: a line that is done submits nothing

        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would take it for the address of this cluster
        runtime_env = yaml.safe_load(Path("jobs/runtime_env.yaml").read_text(encoding="utf-8"))
        try:
            client = JobSubmissionClient(self.dashboard_url, headers=_authorization())
            job_id = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            print(f"job {job_id}: {self.dashboard_url}/#/jobs/{job_id}", flush=True)
            asyncio.run(_show_log(client, job_id))
            return client.get_job_info(job_id)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise ClusterError("Ray's job server refused the job or is lost", got=error) from error

    def is_done(self, job: Path, arguments: Sequence[str]) -> bool:
        """Ask the job, here and without Ray, whether its result is there already."""
        command = [sys.executable, str(job), *arguments, CHECK]
        return subprocess.run(command, env=_environment(self.cluster_id), capture_output=True).returncode == 0

    def deploy(self, serve_config: Path) -> None:
        """Send a Serve application file to the cluster; it comes up in the background.

        Raises:
            ClusterError: Serve refused the file.
        """
        if self.run(["serve", "deploy", str(serve_config), "--address", self.dashboard_url]) != 0:
            raise ClusterError(f"{serve_config}: not deployed", do="read Serve's answer above")

    def serve_status(self) -> dict[str, Any]:
        """Return what `serve status` is made of."""
        route = f"{self.dashboard_url}/api/serve/applications/"
        try:
            answer = httpx.get(route, headers=_authorization(), timeout=_STATUS_TIMEOUT_S).raise_for_status()
        except httpx.HTTPError as error:
            raise ClusterError("the dashboard does not tell Serve's status", got=error) from None
        status: dict[str, Any] = answer.json()
        return status

    def run(self, command: Sequence[str]) -> int:
        """Run one of Ray's commands as this cluster's user would; it is ended if this process is interrupted."""
        with subprocess.Popen(command, env=_environment(self.cluster_id)) as process:
            try:
                return process.wait()
            except BaseException:
                process.kill()
                raise

    def stop(self) -> None:
        """End every process of the cluster and remove its temporary files."""
        end_processes(self.cluster_id)
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        state = storage_root() / STATE_FILE
        if (other := read_state()) and other.cluster_id == self.cluster_id:
            state.unlink()


def start(config: LocalClusterConfig, *, outlives_us: bool) -> LocalCluster:
    """Start the head and wait until it takes jobs. One that does not outlive us is ended even if we are killed.

    Raises:
        ClusterError: a port is in use, another cluster of this storage root runs, or Ray did not come up.
    """
    if (running := read_state()) and running.is_running:
        raise ClusterError("a cluster is already running here", got=running.dashboard_url, do="make down")
    check_port_is_free(config.dashboard_port, "Ray's dashboard", "cluster.dashboard_port=NUMBER")
    cluster_id = uuid.uuid4().hex
    _make_token(cluster_id)
    temp_dir = tempfile.mkdtemp(prefix="ph-", dir="/tmp")  # short: Ray's socket paths have a limit of 107 bytes
    log = Path(temp_dir) / "head.log"
    with log.open("w", encoding="utf-8") as output:
        head = subprocess.Popen(
            _head_command(config, temp_dir),
            env=_environment(cluster_id),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=None if outlives_us else _die_with_parent,
        )
    cluster = LocalCluster(cluster_id, head.pid, temp_dir, config.dashboard_port)
    storage_root().mkdir(parents=True, exist_ok=True)
    write_atomically(storage_root() / STATE_FILE, json.dumps(asdict(cluster)))
    try:
        _wait_until_up(cluster, head, log)
    except BaseException:
        cluster.stop()
        raise
    return cluster


@contextlib.contextmanager
def running(config: LocalClusterConfig) -> Iterator[LocalCluster]:
    """A cluster for the length of a `with` block; nothing of it is left after an error, Ctrl-C or SIGTERM."""
    cluster = start(config, outlives_us=False)
    try:
        yield cluster
    finally:
        cluster.stop()


def read_state() -> LocalCluster | None:
    """Return the cluster that was last started on this storage root, running or not."""
    try:
        return LocalCluster(**json.loads((storage_root() / STATE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _head_command(config: LocalClusterConfig, temp_dir: str) -> list[str]:
    groups = json.dumps({"data": 1000, "train": 1000, "serve": 1000})
    options = {
        "--port": find_free_port(),
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": config.dashboard_port,
        "--dashboard-agent-listen-port": 0,
        "--ray-client-server-port": find_free_port(),
        "--num-cpus": config.num_cpus,
        "--resources": groups,
        "--object-store-memory": config.object_store_mib * 2**20,
        "--temp-dir": temp_dir,
    }
    flags = ["--head", "--block", "--include-dashboard=true", "--disable-usage-stats"]
    return [_tool("ray"), "start", *flags, *(f"{name}={value}" for name, value in options.items())]


def _make_token(cluster_id: str) -> None:
    """Have Ray write a token where there is none; asking takes it seconds, so where it would look is looked at here first."""
    if not ({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or Path("~/.ray/auth_token").expanduser().exists()):
        command = [_tool("ray"), "get-auth-token", "--generate"]
        subprocess.run(command, env=_environment(cluster_id), check=True, capture_output=True)


def _environment(cluster_id: str) -> dict[str, str]:
    """The caller's environment, this interpreter's commands first, and what marks and joins the cluster."""
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    marks = {CLUSTER_VARIABLE: cluster_id, STORAGE_VARIABLE: str(storage_root()), "RAY_AUTH_MODE": "token"}
    # A head that is told to stop would first wait half a minute for its node to be drained; there is no other to take over.
    marks["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    marks["SPT_NOENV"] = "1"  # Ray's processes that name themselves would write over their environment, and the mark in it
    return environment | marks | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def _authorization() -> dict[str, str]:
    """What the dashboard asks for: the token, from where Ray would take it."""
    environment = os.environ
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    token = environment.get("RAY_AUTH_TOKEN") or path.read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"}


async def _show_log(client: JobSubmissionClient, job_id: str) -> None:
    """Print what the job prints until it ends."""
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _die_with_parent() -> None:
    """Ask Linux to kill the head when we die of kill -9, and Ray's reaper the rest; elsewhere there is no such call.

    A head that is only told to end can hang: while it starts, it waits in C for a server that has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _wait_until_up(cluster: LocalCluster, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(timeout=5) as client:
        while head.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{cluster.dashboard_url}/api/version").status_code in (200, 401):
                    return
            time.sleep(0.3)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise ClusterError("Ray's head did not come up", got=tail)
