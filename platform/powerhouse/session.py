"""How a job gets its Ray cluster. [Ray]"""

from __future__ import annotations

import os

import ray

from powerhouse.errors import ClusterError

_NUM_LOCAL_CPUS = 8
_GROUPS = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}


def connect() -> None:
    """Connect to the cluster that runs this job or this machine; with none, start a local one that ends with the process.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "local":
        try:
            ray.init(address=address)
            return
        except ConnectionError as error:
            if address != "auto":
                raise ClusterError("no Ray cluster answers", got=f"RAY_ADDRESS={address} ({error})") from None
    ray.init(address="local", num_cpus=_NUM_LOCAL_CPUS, resources=_GROUPS, include_dashboard=False)
