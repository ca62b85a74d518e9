"""A server that speaks S3 over HTTP on the loopback, in a process of its own, found through the usual AWS_* variables.

It is moto's: bytes, multipart uploads, listings, missing buckets and refused keys are those of the protocol. It checks no
signature unless told to (`refuse_all_keys`), and keeps everything in memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pyarrow.fs
import pytest

from powerhouse.cluster.processes import find_free_port

_START_S = 60


@dataclass(frozen=True)
class S3Server:
    """A running server; `uri` is an empty bucket of the test's own."""

    endpoint: str
    process: subprocess.Popen[bytes]
    uri: str = ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def refuse_all_keys(endpoint: str, *, refuses: bool = True) -> None:
    """From the next request on, no key has a right to anything."""
    httpx.post(f"{endpoint}/moto-api/reset-auth", content=b"0" if refuses else b"inf").raise_for_status()


def start_server() -> S3Server:
    port = find_free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3Server(f"http://127.0.0.1:{port}", process)
    deadline = time.monotonic() + _START_S
    while not _answers(server.endpoint):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not answer"
        time.sleep(0.05)
    return server


def _answers(endpoint: str) -> bool:
    try:
        httpx.get(endpoint, timeout=5)
    except httpx.TransportError:
        return False
    return True


def make_bucket(endpoint: str, name: str) -> str:
    """Return the URI of a new bucket."""
    pyarrow.fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}"


def variables(endpoint: str) -> dict[str, str]:
    """Return what a client needs in its environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="module")
def _server() -> Iterator[S3Server]:
    server = start_server()
    yield server
    server.kill()


@pytest.fixture
def s3(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Give a bucket of the test's own, and point the environment at its server (one for each module)."""
    for name, value in variables(_server.endpoint).items():
        monkeypatch.setenv(name, value)
    test = os.environ["PYTEST_CURRENT_TEST"]
    return S3Server(_server.endpoint, _server.process, make_bucket(_server.endpoint, f"bucket-{abs(hash(test)):x}"))
