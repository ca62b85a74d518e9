"""Do two systems differ, on the same items? By approximate randomisation or by the paired bootstrap, over any metric's rows.

Shapes: N items, S sums of an item, R trials.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from powerhouse.config import Config
from powerhouse.errors import InputError
from powerhouse.evaluation.metric import Metric
from powerhouse.evaluation.score import NUM_RESAMPLES, Sums, Values, block_sizes, percentile_interval, resample, total

Test = Literal["randomisation", "bootstrap"]
NUM_TRIALS = {"randomisation": 10_000, "bootstrap": NUM_RESAMPLES}


class Comparison(Config):
    """One value of a metric for two systems."""

    baseline: float
    """The value of the first system."""
    other: float
    """The value of the second system."""
    difference: float
    """other - baseline."""
    interval: tuple[float, float]
    """95 % paired bootstrap interval of the difference."""
    p_value: float
    """Share of trials with a difference at least as large, were the systems alike."""
    n: int
    """Number of items."""
    signature: str
    """Of the metric, and of the test."""


def compare(
    metric: Metric, baseline_NS: Sums, other_NS: Sums, *, test: Test = "randomisation", seed: int = 0
) -> dict[str, Comparison]:
    """Compare two systems by the rows of the same items in the same order.

    `randomisation`: two-sided; each trial swaps the systems' rows of each item by a coin (Noreen 1989; Riezler and Maxwell
    2005). `bootstrap`: by how much the difference's size exceeds its mean over the resamples (Koehn 2004, as in Moses and
    sacrebleu: one tail). Both count (c + 1) / (R + 1), ties included, so that a system against itself has 1.

    Raises:
        InputError: there are fewer than two items, or the two are not of the same items.
    """
    _check(metric, baseline_NS, other_NS)
    baseline, other = metric.values(total(baseline_NS)), metric.values(total(other_NS))
    resampled = [metric.values(resample(sums_NS, seed)) for sums_NS in (baseline_NS, other_NS)]
    differences = {name: resampled[1][name] - resampled[0][name] for name in baseline}
    if test == "bootstrap":
        trials = {name: np.abs(values) - np.abs(values).mean() for name, values in differences.items()}
    else:
        trials = _swap(metric, baseline_NS, other_NS, seed)
    signature = f"{metric.signature(baseline_NS)}|test:{test},{NUM_TRIALS[test]}"
    return {
        name: Comparison(
            baseline=float(baseline[name]),
            other=float(other[name]),
            difference=float(other[name] - baseline[name]),
            interval=percentile_interval(differences[name]),
            p_value=_p_value(trials[name], abs(float(other[name] - baseline[name]))),
            n=len(baseline_NS),
            signature=signature,
        )
        for name in baseline
    }


def _check(metric: Metric, baseline_NS: Sums, other_NS: Sums) -> None:
    if len(baseline_NS) != len(other_NS):
        got = f"{len(baseline_NS)} and {len(other_NS)} items"
        raise InputError("a paired test needs the same items from both systems", got=got)
    if len(baseline_NS) < 2:
        raise InputError("a paired test needs more items", got=len(baseline_NS), allowed="at least 2")
    signatures = [metric.signature(sums_NS) for sums_NS in (baseline_NS, other_NS)]
    if signatures[0] != signatures[1]:
        raise InputError("the two systems were not scored alike", got=" and ".join(signatures), allowed="equal signatures")


def _swap(metric: Metric, baseline_NS: Sums, other_NS: Sums, seed: int) -> dict[str, Values]:
    """Sizes [R] of the differences between systems that took each other's rows at random."""
    generator = np.random.default_rng(seed)
    both_S = total(baseline_NS) + total(other_NS)
    found: dict[str, list[Values]] = {}
    for size in block_sizes(NUM_TRIALS["randomisation"], len(baseline_NS)):
        is_kept_RN = generator.integers(2, size=(size, len(baseline_NS)), dtype=bool).astype(np.float64)
        one_RS = other_NS.sum(axis=0) + is_kept_RN @ (baseline_NS - other_NS)
        one, two = metric.values(one_RS), metric.values(both_S - one_RS)
        for name in one:
            found.setdefault(name, []).append(np.abs(one[name] - two[name]))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _p_value(trials_R: Values, difference: float) -> float:
    rounding = 1e-12 * max(difference, 1.0)
    return (int((trials_R >= difference - rounding).sum()) + 1) / (len(trials_R) + 1)
