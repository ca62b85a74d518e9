"""How much of a Ray cluster the stages of this package take, and where their tasks land. [Ray]"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from ray.data import DataContext, ExecutionResources

from powerhouse import session
from powerhouse.config import Config

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
        return {"num_cpus": self.num_cpus, "resources": {"data": 0.001}}


def connect(workers: WorkersConfig) -> None:
    """Connect for data work; from here on the datasets of this process take no more of the cluster than `workers` says."""
    session.connect("data")
    # Twice: while the workers hold their part, the tasks that feed them need as much again.
    limits = ExecutionResources(cpu=max(1.0, 2 * workers.num * workers.num_cpus))
    DataContext.get_current().execution_options.resource_limits = limits
