"""A score: the value that sums of items give, its bootstrap interval, the number of items, and what was computed.

Shapes: N items, S sums of an item, R resamples. Rows only ever add, so that a resample is one row of a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from powerhouse.config import Config
from powerhouse.errors import InputError

Sums = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]
Finalise = Callable[[Sums], Values]
"""Sums [..., S] -> the metric's values [...]: over all items, or over each of many resamples at once."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95

_BLOCK_COUNTS = 2**22
"""Numbers held at a time while resampling: 32 MiB."""


class Score(Config):
    """A number with what is needed to trust and to repeat it."""

    value: float
    """The metric over all items."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval over the items; None where one item, or one figure of the whole, has no spread."""
    n: int
    """Number of items."""
    signature: str
    """What was computed, and how: two scores compare only where their signatures agree."""


def make_signature(**facts: Any) -> str:
    return "|".join(f"{name}:{value}" for name, value in facts.items())


def make_score(sums_NS: Sums, finalise: Finalise, signature: str, seed: int = 0) -> Score:
    resampled = None if len(sums_NS) < 2 else finalise(resample(sums_NS, seed))
    return as_score(float(finalise(total(sums_NS))), resampled, len(sums_NS), signature)


def as_score(value: float, resampled_R: Values | None, n: int, signature: str) -> Score:
    """Percentile interval (Efron and Tibshirani 1993, section 13.3) of the values of the resamples."""
    return Score(
        value=value,
        interval=None if resampled_R is None else percentile_interval(resampled_R),
        n=n,
        signature=f"{signature}|interval:bootstrap,{NUM_RESAMPLES},{CONFIDENCE}",
    )


def percentile_interval(values_R: Values) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values_R, [tail, 100 - tail])
    return float(low), float(high)


def total(sums_NS: Sums) -> Sums:
    """The sums over all items, exactly rounded: the same to the bit in any order of the items.

    Raises:
        InputError: there is no item.
    """
    if not len(sums_NS):
        raise InputError("no item to score", allowed="at least one")
    return np.array([math.fsum(column) for column in sums_NS.T])


def resample(sums_NS: Sums, seed: int, num_resamples: int = NUM_RESAMPLES) -> Sums:
    """Sums [R, S] over as many items, drawn with replacement. Rows of two systems resampled by one seed stay paired."""
    num_items = len(sums_NS)
    generator = np.random.default_rng(seed)

    def draw(size: int) -> npt.NDArray[np.int64]:
        drawn = (generator.integers(0, num_items, num_items) for _ in range(size))
        return np.stack([np.bincount(numbers, minlength=num_items) for numbers in drawn])

    return np.concatenate([draw(size).astype(np.float64) @ sums_NS for size in block_sizes(num_resamples, num_items)])


def block_sizes(num_rows: int, row_size: int) -> Iterator[int]:
    """Cut the rows of a matrix into blocks that fit in memory."""
    size = max(_BLOCK_COUNTS // max(row_size, 1), 1)
    for start in range(0, num_rows, size):
        yield min(size, num_rows - start)
