from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from powerhouse.evaluation.score import make_score, make_signature


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def test_the_value_is_that_of_the_merged_sums_and_not_the_mean_of_the_items() -> None:
    score = make_score(np.array([[1.0, 1.0], [1.0, 9.0]]), ratio, "x")

    assert score.value == 0.2
    assert score.n == 2
    assert score.signature == "x|interval:bootstrap,1000,0.95"


def test_the_interval_agrees_with_the_bootstrap_of_scipy() -> None:
    generator = np.random.default_rng(0)
    num_bytes = generator.integers(100, 1000, size=200).astype(float)
    sums_NS = np.stack([num_bytes * generator.normal(2.0, 0.3, size=200), num_bytes], axis=1)

    low, high = make_score(sums_NS, ratio, "x").interval

    expected = stats.bootstrap(
        (sums_NS[:, 0], sums_NS[:, 1]), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=5000, rng=1,
    ).confidence_interval  # fmt: skip
    assert low == pytest.approx(expected.low, abs=0.01)
    assert high == pytest.approx(expected.high, abs=0.01)


def test_the_interval_is_the_same_every_time() -> None:
    sums_NS = np.random.default_rng(0).uniform(1, 2, size=(10, 2))

    assert make_score(sums_NS, ratio, "x") == make_score(sums_NS, ratio, "x")


def test_one_item_has_no_interval() -> None:
    assert make_score(np.array([[2.0, 1.0]]), ratio, "x").interval is None


def test_a_signature_names_its_facts_in_order() -> None:
    assert make_signature(metric="bleu", context=256) == "metric:bleu|context:256"
