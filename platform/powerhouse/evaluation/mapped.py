"""A metric's rows from many processes at once. [Ray]

Items are cut into blocks by their numbers alone, and a block is always computed whole: the rows are the same to the bit for any
number of workers, for a metric that batches too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from powerhouse.evaluation.metric import Metric, Pair, Part, merge
from powerhouse.evaluation.pool import in_pool
from powerhouse.evaluation.score import Sums
from powerhouse.telemetry import progress

if TYPE_CHECKING:
    from powerhouse.evaluation.settings import PoolConfig

BLOCK_ITEMS = 1000
"""Items that go to a worker at a time."""


def map_statistics(metric: Metric, pairs: Sequence[Pair], config: PoolConfig, block_items: int = BLOCK_ITEMS) -> Sums:
    """The rows of all items in their order, as `metric.statistics(pairs)` in one process.

    Raises:
        PowerhouseError: what the metric raised in a worker.
        ClusterError: a worker died, again and again.
    """
    columns = {
        "number": range(len(pairs)),
        "hypothesis": [pair.hypothesis for pair in pairs],
        "references": [list(pair.references) for pair in pairs],
    }
    numbers, rows = [], []
    with progress("scoring", len(pairs), "item") as bar:
        for row in in_pool(RowMaker, (metric.prepare(pairs),), columns, config, block_items):
            numbers.append(row["number"])
            rows.append(row["sums"])
            bar.update()
    return merge([Part(np.array(numbers), np.array(rows))]).sums_NS


class RowMaker:
    """A Ray Data actor: items in, rows out."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        texts = zip(batch["hypothesis"], batch["references"], strict=True)
        pairs = [Pair(hypothesis, tuple(references)) for hypothesis, references in texts]
        return {"number": batch["number"], "sums": self._metric.statistics(pairs)}
