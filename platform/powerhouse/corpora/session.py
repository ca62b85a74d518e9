"""How much of a Ray cluster the stages of this package take, and where their tasks land. [Ray]"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.exceptions import RayError

from powerhouse import session
from powerhouse.config import Config
from powerhouse.errors import ClusterError, PowerhouseError

TABLES: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""Ray Data's options of a step that takes and gives whole Arrow tables."""

_BLOCK_BYTES = 2**20
"""Larger tables go from worker to worker one by one, not joined to Ray Data's usual 128 MB: less memory, more to share out."""
_MAX_RETRIES = 5


class WorkersConfig(Config):
    """How much of the cluster a stage takes. It changes how long the stage takes, never what it writes."""

    num: int = Field(default=2, ge=1)
    """Worker processes that stay up for the stage."""
    num_cpus: float = Field(default=0.5, gt=0)
    """CPUs that Ray sets aside for each worker and each task; 1 on a cluster, less on one small machine."""

    def options(self) -> dict[str, Any]:
        """Give Ray's options of one task: its CPUs, and the group of nodes for data work."""
        return {"num_cpus": self.num_cpus, "resources": {"data": 0.001}}

    def pool(self, max_size: int) -> dict[str, Any]:
        """Give Ray Data's options of a pool of actors; a task that kills each of several ends the stage with an error."""
        size = min(self.num, max_size)
        return self.options() | {"compute": ActorPoolStrategy(size=size), "max_task_retries": _MAX_RETRIES}


def connect(workers: WorkersConfig) -> None:
    """Connect for data work; from here on the datasets of this process take no more of the cluster than `workers` says."""
    session.connect("data")
    # Twice: while the workers hold their part, the tasks that feed them need as much again.
    limits = ExecutionResources(cpu=max(1.0, 2 * workers.num * workers.num_cpus))
    context = DataContext.get_current()
    context.execution_options.resource_limits = limits
    context.target_max_block_size = _BLOCK_BYTES
    context.raise_original_map_exception = True


@contextmanager
def worker_failures(what: str) -> Iterator[None]:
    """Turn what Ray tells of a worker, of which it has tried several, into one error.

    Raises:
        ClusterError: workers died or ended with an error.
    """
    try:
        yield
    except RayError as error:
        cause = error
        while isinstance(deeper := getattr(cause, "cause", None), Exception):
            cause = deeper
        if isinstance(cause, PowerhouseError):
            raise cause from None
        told = str(cause).strip().splitlines()
        do = "see that the workers have memory and room on their disks; run the job again: what is finished is kept"
        got = f"{type(cause).__name__}: {told[0] if told else ''}"
        raise ClusterError(f"{what}: the workers cannot do their part", got=got, do=do) from error
