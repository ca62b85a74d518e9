from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from powerhouse.errors import InputError
from powerhouse.evaluation.labels import Accuracy, ExactMatch
from powerhouse.evaluation.metric import Pair
from powerhouse.evaluation.significance import Test, compare

TESTS: list[Test] = ["randomisation", "bootstrap"]


def rows(is_right: np.ndarray) -> np.ndarray:
    return Accuracy().statistics([Pair("x" if right else "y", ("x",)) for right in is_right])


def test_randomisation_agrees_with_the_permutation_test_of_scipy() -> None:
    generator = np.random.default_rng(0)
    one, two = generator.random(200) < 0.5, generator.random(200) < 0.58

    found = compare(Accuracy(), rows(one), rows(two))["accuracy"]

    expected = stats.permutation_test(
        (one.astype(float), two.astype(float)), lambda a, b, axis: (b - a).mean(axis), permutation_type="samples",
        vectorized=True, n_resamples=5000, rng=1,
    )  # fmt: skip
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert found.difference == pytest.approx(two.mean() - one.mean())
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.n == 200
    assert found.signature.endswith("|test:randomisation,10000")


@pytest.mark.parametrize("test", TESTS)
def test_a_system_does_not_differ_from_itself(test: Test) -> None:
    sums_NS = rows(np.arange(30) % 3 == 0)

    found = compare(Accuracy(), sums_NS, sums_NS, test=test)["accuracy"]

    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("test", TESTS)
def test_a_clear_difference_has_a_small_p_value_and_an_interval_without_zero(test: Test) -> None:
    found = compare(Accuracy(), rows(np.arange(100) < 20), rows(np.arange(100) < 60), test=test)["accuracy"]

    assert found.p_value < 0.001
    assert found.interval[0] > 0.2


def test_the_p_value_of_alike_systems_is_rarely_small() -> None:
    generator = np.random.default_rng(0)
    values = [
        compare(Accuracy(), rows(generator.random(40) < 0.5), rows(generator.random(40) < 0.5), seed=seed)["accuracy"].p_value
        for seed in range(10)
    ]

    assert sum(value < 0.05 for value in values) <= 3  # 0.5 is expected; 4 or more have probability 0.001


@pytest.mark.parametrize(
    ("baseline", "other", "message"),
    [
        (rows(np.ones(3)), rows(np.ones(4)), "needs the same items from both systems\n  got: 3 and 4 items"),
        (rows(np.ones(1)), rows(np.ones(1)), "needs more items\n  got: 1"),
        (
            ExactMatch().statistics([Pair("x", ("x", "y"))] * 2),
            ExactMatch().statistics([Pair("x", ("x",))] * 2),
            "not scored alike\n  got: metric:exact_match|normalise:squad|refs:2",
        ),
    ],
)
def test_systems_that_cannot_be_paired_are_refused(baseline: np.ndarray, other: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as caught:
        compare(ExactMatch(), baseline, other)
    assert message in str(caught.value)
