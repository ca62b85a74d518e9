"""Shared by all tests; what needs a GPU or a browser is collected only where there is one; data lies in a test's own folder."""

from __future__ import annotations

import gc
import os
import secrets
from pathlib import Path

import hypothesis
import pytest
import torch

from browser import find_browser
from local_ray import local_ray  # noqa: F401 - a fixture of any test, as the next two
from s3 import _server, s3  # noqa: F401

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=50
)
hypothesis.settings.load_profile("untimed")
# Tensors are tiny here: a second thread would only wait, and take the core from whatever else runs.
torch.set_num_threads(1)

# One token for every Ray that the tests start: a process reads it once, and none is to be left in the home folder.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Hundreds of processes are started: without bytecode each of them would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Ray's log monitor looks for new files twice a second, not ten times: it took as much of a CPU as a start of two workers.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")

# What is downloaded is kept between runs of the tests, as between runs of the demo.
os.environ.setdefault("POWERHOUSE_CACHE", str(Path(__file__).parents[1] / "runs" / "cache"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # the longest first, so that no process is left with them at the end
    missing = {"gpu": not torch.cuda.is_available(), "browser": find_browser() is None}
    left_out = [
        item for item in items if any(is_missing and item.get_closest_marker(name) for name, is_missing in missing.items())
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collectstart() -> None:
    gc.disable()  # what is imported and collected stays: looking for garbage in it is a sixth of the collection, and more later


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _rank(item: pytest.Item) -> tuple[float, bool]:
    timeout = item.get_closest_marker("timeout")
    return (-float(timeout.args[0]) if timeout else 0.0, item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERHOUSE_STORAGE", str(tmp_path))
