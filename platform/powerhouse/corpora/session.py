"""How the stages of this package run on a Ray cluster: connect, and where their tasks land. [Ray]"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from pydantic import Field
from ray.data import DataContext, ExecutionResources

from powerhouse.config import Config
from powerhouse.errors import ClusterError

_GROUP = "data"
_NUM_LOCAL_CPUS = 4

TABLES: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""Ray Data's options of a step that takes and gives whole Arrow tables."""


class WorkersConfig(Config):
    """How much of the cluster a stage takes. It changes how long the stage takes, never what it writes."""

    num: int = Field(default=2, ge=1)
    """Worker processes that stay up for the stage."""
    num_cpus: float = Field(default=0.5, gt=0)
    """CPUs that Ray sets aside for each worker and each task; 1 on a cluster, less on one small machine."""

    def options(self) -> dict[str, Any]:
        """Give Ray's options of one task: its CPUs, and the group of nodes for data work."""
        return {"num_cpus": self.num_cpus, "resources": {_GROUP: 0.001}}


def connect(workers: WorkersConfig) -> None:
    """Connect to the cluster that runs this job or this machine; with none, start a local one that ends with the process.

    From here on the datasets of this process take no more of the cluster than `workers` says, and show no bars of their own.

    Raises:
        ClusterError: no node of the cluster is for data work.
    """
    if not ray.is_initialized():
        _connect_or_start(os.environ.get("RAY_ADDRESS", "auto"))
    if _GROUP not in ray.cluster_resources():
        what = f"the cluster has no node with the resource {_GROUP!r}"
        raise ClusterError(
            what, got=sorted(ray.cluster_resources()), do=f"start nodes with --resources '{{\"{_GROUP}\": 1000}}'"
        )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Twice: while the workers hold their part, the tasks that feed them need as much again.
    context.execution_options.resource_limits = ExecutionResources(cpu=max(1.0, 2 * workers.num * workers.num_cpus))


def _connect_or_start(address: str) -> None:
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            if address != "auto":
                raise ClusterError("no Ray cluster answers", got=f"RAY_ADDRESS={address} ({error})") from None
        else:
            return
    groups = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}
    ray.init(address="local", num_cpus=_NUM_LOCAL_CPUS, resources=groups, include_dashboard=False, log_to_driver=False)
