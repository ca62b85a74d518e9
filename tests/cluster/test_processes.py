from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from powerhouse.cluster import processes
from powerhouse.cluster.processes import (
    CLUSTER_VARIABLE,
    PeakMemory,
    check_port_is_free,
    end_processes,
    find_free_port,
    find_processes,
)
from powerhouse.errors import ClusterError


@pytest.fixture
def cluster_id() -> Iterator[str]:
    cluster_id = uuid.uuid4().hex
    yield cluster_id
    for process in find_processes(cluster_id):
        process.kill()


def spawn(cluster_id: str, code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {CLUSTER_VARIABLE: cluster_id})


def wait_for_count(cluster_id: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(find_processes(cluster_id)) != count:
        assert time.monotonic() < deadline, find_processes(cluster_id)
        time.sleep(0.05)


ORPHAN_MAKER = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
subprocess.Popen(sleep, start_new_session=True)
time.sleep(600)
"""


def test_orphans_in_other_sessions_that_ignore_sigterm_are_found_and_ended(cluster_id: str) -> None:
    with spawn(cluster_id, ORPHAN_MAKER):
        wait_for_count(cluster_id, 2)
        end_processes(cluster_id)

        assert find_processes(cluster_id) == []


def test_a_child_that_has_lost_the_mark_is_found_by_its_parent(cluster_id: str) -> None:
    sleep = "import time; time.sleep(600)"
    with spawn(cluster_id, f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}'], env={{}}); {sleep}"):
        wait_for_count(cluster_id, 2)
        child = next(process for process in find_processes(cluster_id) if CLUSTER_VARIABLE not in process.environ())
        end_processes(cluster_id)

        child.wait(60)


def test_a_process_of_another_cluster_is_left_alone(cluster_id: str) -> None:
    with spawn("other", "import time; time.sleep(600)") as other:
        try:
            end_processes(cluster_id)

            assert other.poll() is None
        finally:
            other.kill()


def test_memory_of_all_processes_is_summed(cluster_id: str) -> None:
    with spawn(cluster_id, "import time; block = bytearray(200 << 20); print(len(block)); time.sleep(600)") as process:
        with PeakMemory(cluster_id, interval_s=0.05) as memory:
            deadline = time.monotonic() + 120
            while memory.peak_bytes < 200 << 20:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.kill()

    assert memory.peak_bytes < 400 << 20


def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]

        with pytest.raises(ClusterError) as caught:
            check_port_is_free(port, "the endpoint", "http_port=NUMBER")
    assert str(caught.value) == (
        f"port {port} (the endpoint) is already in use\n  got: pid {os.getpid()} ({process_name()}) listens there\n"
        "  do: stop that process, or choose another port: http_port=NUMBER"
    )


def process_name() -> str:
    import psutil

    return psutil.Process().name()


def test_a_free_port_passes() -> None:
    check_port_is_free(find_free_port(), "anything", "x=NUMBER")


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port := find_free_port()))
        monkeypatch.setattr(processes, "_OWN_PORTS", range(port, port + 1))
        with pytest.raises(ClusterError, match=f"no port is free\n  allowed: one of {port} to {port}"):
            find_free_port()
