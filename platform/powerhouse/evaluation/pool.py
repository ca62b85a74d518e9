"""Work spread over actors that each hold a copy of a model. [Ray]"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from powerhouse.errors import ClusterError, PowerhouseError
from powerhouse.evaluation.settings import PoolConfig
from powerhouse.session import connect

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
    done = ray.data.from_arrow([table.slice(start, size) for start in range(0, len(table), size)]).map_batches(
        actor_class,
        fn_constructor_args=arguments,
        batch_size=None,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        resources={"data": 0.001},
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
    )
    try:
        yield from done.iter_rows()
    except RayError as error:
        if (cause := _own_error(error)) is not None:
            raise type(cause)(str(cause)) from None
        raise ClusterError("the actors failed", got=error, do="see their log") from error


def _own_error(error: BaseException | None) -> PowerhouseError | None:
    """The error of ours inside what Ray makes of it."""
    while error is not None:
        inner = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, PowerhouseError) and inner is None:
            return error
        error = inner
    return None
