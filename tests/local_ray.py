"""One Ray for all tests of a process that need one here: most of what a test takes is its start, and that of its own actors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """Start it and give its address; it has the resources of all three groups of nodes."""
    import ray  # takes a second, which tests without it need not wait

    groups = {"data": 1000, "train": 1000, "serve": 1000}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local", num_cpus=4, resources=groups, include_dashboard=False, _temp_dir=temporary, log_to_driver=False
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
