"""Find, measure and end every process of a local cluster, however it was orphaned.

All of them inherit one environment variable with the cluster's id; parents and process groups change when a parent is
killed, the environment does not. A process that has lost it is known as a child of the others.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from types import TracebackType

import psutil

from powerhouse.errors import ClusterError

CLUSTER_VARIABLE = "POWERHOUSE_CLUSTER"
_OWN_PORTS = range(20_000, 30_000)  # over those of Ray's workers, under those of Linux for outgoing connections


def find_processes(cluster_id: str) -> list[psutil.Process]:
    """List the living processes that carry the cluster's id, with all their children, this one left out."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        if process.pid != psutil.Process().pid and _cluster_of(process) == cluster_id:
            found |= {process, *_children(process)}
    return sorted(found, key=lambda process: process.pid)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return []


def _cluster_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        value: str | None = process.environ().get(CLUSTER_VARIABLE)
        return value
    except (psutil.Error, OSError):  # gone meanwhile, or another user's
        return None


def end_processes(cluster_id: str, grace_s: float = 30.0) -> None:
    """Kill until nothing carries the id. Nothing is lost by it: results count once their manifest is written."""
    deadline = time.monotonic() + grace_s
    while left := find_processes(cluster_id):
        if time.monotonic() > deadline:
            raise ClusterError("processes of the cluster do not end", got=[process.pid for process in left])
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def check_port_is_free(port: int, purpose: str, how_to_change: str) -> None:
    """Raise where somebody listens.

    Raises:
        ClusterError: the port is in use; the message names the process where the system tells.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ClusterError(
                f"port {port} ({purpose}) is already in use",
                got=_listener(port),
                do=f"stop that process, or choose another port: {how_to_change}",
            ) from None


def find_free_port() -> int:
    """Name a port that nobody listens on now; it is not reserved, but lies under those that systems hand out by themselves.

    Raises:
        ClusterError: a hundred ports are in use.
    """
    for port in random.sample(_OWN_PORTS, min(100, len(_OWN_PORTS))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ClusterError("no port is free", allowed=f"one of {_OWN_PORTS.start} to {_OWN_PORTS.stop - 1}")


def _listener(port: int) -> str | None:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()}) listens there"
    return None


class PeakMemory:
    """While entered, samples the memory of all the cluster's processes; shared pages count once (PSS on Linux).

    At most a twentieth of the time goes into it: the system looks at every page for it.
    """

    def __init__(self, cluster_id: str, interval_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self._is_member: dict[psutil.Process, bool] = {}  # asked once for each process: the answer cannot change
        self._cluster_id = cluster_id
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            start = time.monotonic()
            for process in (living := set(psutil.process_iter())) - self._is_member.keys():
                self._is_member[process] = _cluster_of(process) == self._cluster_id
            total = sum(_memory_bytes(process) for process in living if self._is_member[process])
            self.peak_bytes = max(self.peak_bytes, total)
            self._stop.wait(max(self._interval_s, 19 * (time.monotonic() - start)))


def _memory_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.uss))
    except (psutil.Error, OSError):
        return 0
