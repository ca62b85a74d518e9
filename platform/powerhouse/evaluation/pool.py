"""Work spread over actors that each hold a copy of a model. [Ray]"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from powerhouse import errors
from powerhouse.errors import ClusterError, PowerhouseError
from powerhouse.session import connect

if TYPE_CHECKING:  # an actor of a metric needs no torch, which the settings of a whole evaluation bring along
    from powerhouse.evaluation.settings import PoolConfig

Batch = dict[str, npt.NDArray[Any]]

_REFUSED = "refused"
_MAX_ROWS = 64
"""Of a block: what a kill can lose."""


def in_pool(
    actor_class: type,
    arguments: tuple[Any, ...],
    columns: Mapping[str, Sequence[Any]],
    config: PoolConfig,
    block_rows: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Give what the actors make of the rows, as it comes, of a block at a time. If its size is not given, a block is small, so
    that no actor waits long for the last one.

    Raises:
        PowerhouseError: what an actor raised.
        ClusterError: an actor died, again and again.
    """
    connect("data")
    table = pa.table(dict(columns))
    size = block_rows or min(_MAX_ROWS, math.ceil(len(table) / (4 * config.num_actors)))
    done = ray.data.from_blocks([table.slice(start, size) for start in range(0, len(table), size)]).map_batches(
        _Actor,
        fn_constructor_args=(actor_class, *arguments),
        batch_size=None,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        resources={"data": 0.001},
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
    )
    try:
        for row in done.iter_rows():
            if _REFUSED in row:
                raise getattr(errors, row["kind"])(row[_REFUSED])
            yield row
    except RayError as error:
        raise ClusterError("the actors failed", got=error, do="see their log") from error


class _Actor:
    """Does an actor's work; what it refuses comes back as a value, for what Ray makes of an exception has no cause."""

    def __init__(self, actor_class: type, *arguments: Any) -> None:
        self._refusal: PowerhouseError | None = None
        try:
            self._work = actor_class(*arguments)
        except PowerhouseError as error:
            self._refusal = error

    def __call__(self, batch: Batch) -> Batch:
        try:
            if self._refusal is not None:
                raise self._refusal
            done: Batch = self._work(batch)
        except PowerhouseError as error:
            return {"kind": np.array([type(error).__name__]), _REFUSED: np.array([str(error)])}
        return done
