"""A metric's rows from many processes at once. [Ray]

Items are cut into chunks by their numbers alone, and a chunk is always computed whole: the rows are the same to the bit for any
number of workers, for a metric that batches too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from pydantic import Field
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from powerhouse.config import Config
from powerhouse.errors import ClusterError, PowerhouseError
from powerhouse.evaluation.metric import Metric, Pair, Part, merge
from powerhouse.evaluation.score import Sums
from powerhouse.session import connect
from powerhouse.telemetry import progress


class MappingConfig(Config):
    """How much of the cluster scoring takes; the scores do not depend on it."""

    num_workers: int = Field(default=2, ge=1)
    """Processes that score items."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray sets aside for each."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that Ray sets aside for each."""
    chunk_items: int = Field(default=1000, ge=1)
    """Items that go to a worker at a time."""


def map_statistics(metric: Metric, pairs: Sequence[Pair], config: MappingConfig) -> Sums:
    """The rows of all items in their order, as `metric.statistics(pairs)` in one process.

    Raises:
        ClusterError: the workers could not do their part.
    """
    connect("data")
    ready = metric.prepare(pairs)
    table = pa.table(
        {
            "number": range(len(pairs)),
            "hypothesis": [pair.hypothesis for pair in pairs],
            "references": [list(pair.references) for pair in pairs],
        }
    )
    chunks = [table.slice(start, config.chunk_items) for start in range(0, len(pairs), config.chunk_items)]
    scored = ray.data.from_arrow(chunks).map_batches(
        RowMaker,
        fn_constructor_args=(ready,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        resources={"data": 0.001},
        compute=ActorPoolStrategy(size=min(config.num_workers, len(chunks))),
    )
    try:
        with progress("scoring", len(pairs), "item") as bar:
            parts = []
            for batch in scored.iter_batches(batch_size=None, batch_format="numpy"):
                parts.append(Part(batch["number"], np.stack(list(batch["sums"]))))
                bar.update(len(batch["number"]))
    except RayError as error:
        raise _explain(error) from error
    return merge(parts).sums_NS


class RowMaker:
    """A Ray Data actor: items in, rows out."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def __call__(self, batch: pa.Table) -> dict[str, npt.NDArray[Any]]:
        columns = batch.to_pydict()
        texts = zip(columns["hypothesis"], columns["references"], strict=True)
        pairs = [Pair(hypothesis, tuple(references)) for hypothesis, references in texts]
        return {"number": np.array(columns["number"], dtype=np.int64), "sums": self._metric.statistics(pairs)}


def _explain(error: RayError) -> PowerhouseError:
    cause: BaseException = error
    while isinstance(deeper := getattr(cause, "cause", None), Exception):
        cause = deeper
    if isinstance(cause, PowerhouseError):
        return cause
    return ClusterError("the items could not be scored", got=str(cause).strip().splitlines()[-1:], do="see the workers' log")
