"""The one shape of a metric: `statistic(item)` -> a row of sums, merge by adding rows, finalise to a Score.

Shapes: N items, S sums of an item. Because rows only ever add, a bootstrap over items needs no second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from powerhouse.config import Config

Sums = npt.NDArray[np.float64]
Finalise = Callable[[Sums], float]
"""Sums [S] of some items -> the metric's value over them."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


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
    return Score(
        value=finalise(sums_NS.sum(axis=0)),
        interval=bootstrap(sums_NS, finalise, seed),
        n=len(sums_NS),
        signature=f"{signature}|interval:bootstrap,{NUM_RESAMPLES},{CONFIDENCE}",
    )


def bootstrap(sums_NS: Sums, finalise: Finalise, seed: int) -> tuple[float, float] | None:
    """Percentile interval (Efron and Tibshirani 1993, section 13.3) over items drawn with replacement."""
    num_items = len(sums_NS)
    if num_items < 2:
        return None
    generator = np.random.default_rng(seed)
    resamples = (generator.multinomial(num_items, np.full(num_items, 1 / num_items)) for _ in range(NUM_RESAMPLES))
    values = [finalise(count_N @ sums_NS) for count_N in resamples]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
