"""Which rows a step learns from: a pure function of (number of rows, seed, step), whatever the number of workers.

Shapes: B rows, R tokens in a row, T = R - 1 predictions. The run reads one endless stream: every epoch is a permutation of all
rows, drawn from (seed, epoch). Step k of the run is the stream's places [k * B, (k + 1) * B), and rank r of n ranks has the
r-th of n equal slices of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowOrder:
    """The stream over `num_rows` rows."""

    num_rows: int
    seed: int

    def rows_at(self, places: Indices) -> Indices:
        """Numbers of the rows that stand at these places of the stream."""
        epochs, offsets = np.divmod(places, self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            is_here = epochs == epoch
            rows[is_here] = _permutation(self.num_rows, self.seed, int(epoch))[offsets[is_here]]
        return rows


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def _permutation(num_rows: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def places_of(step: int, rank: int, num_ranks: int, global_batch_rows: int) -> Indices:
    """Places of the stream that a rank reads in a step."""
    num_here = global_batch_rows // num_ranks
    start = step * global_batch_rows + rank * num_here
    return np.arange(start, start + num_here)
