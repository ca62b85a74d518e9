"""How a job gets its Ray cluster. [Ray]"""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

import ray
from ray.data import DataContext

from powerhouse.errors import ClusterError
from powerhouse.telemetry import make_logger

Group = Literal["data", "train", "serve"]
"""A group of nodes in cluster.yaml, and the resource that only its nodes have."""

_NUM_LOCAL_CPUS = 8


def connect(group: Group, *, shows_workers: bool = False) -> None:
    """Connect to the cluster that runs this job or this machine; with none, start a local one that ends with the process.

    With `shows_workers` what they print comes here too. Ray Data's own bars are off: the stages show theirs.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer.
    """
    if not ray.is_initialized():
        _connect_or_start(os.environ.get("RAY_ADDRESS", "auto"), shows_workers)
    if group not in (there := ray.cluster_resources()):
        # No error: an autoscaler that has given back all nodes of the group starts one when the work asks for it.
        fields = {"group": group, "resources": sorted(there), "do": f"start nodes with the resource {group}, or let them start"}
        make_logger("session").warning("no node of the group is up: the work waits for one", extra={"fields": fields})
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    DataContext.get_current().enable_progress_bars = False


def _connect_or_start(address: str, shows_workers: bool) -> None:
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=shows_workers)
        except ConnectionError as error:
            if address != "auto":
                raise ClusterError("no Ray cluster answers", got=f"RAY_ADDRESS={address} ({error})") from None
        else:
            return
    groups: dict[str, Any] = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}
    ray.init(
        address="local",
        num_cpus=_NUM_LOCAL_CPUS,
        resources=groups,
        include_dashboard=False,
        log_to_driver=shows_workers,
    )
