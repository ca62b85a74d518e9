from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from powerhouse.config import validate
from powerhouse.errors import ConfigError, InputError
from powerhouse.evaluation.labels import Accuracy, AnswerF1, ExactMatch, LabelF1, normalise_answer
from powerhouse.evaluation.metric import Metric, Pair, make_pairs

LABELS = ("joy", "anger", "calm")


def value(metric: Metric, hypotheses: list[str], references: list[str | list[str]], name: str) -> float:
    return metric.score(metric.statistics(make_pairs(hypotheses, references)))[name].value


def test_accuracy_is_the_share_of_right_labels() -> None:
    assert value(Accuracy(), ["x", "y", "x", "Y"], ["x", "y", "z", ["y", "x"]], "accuracy") == 0.5


@pytest.mark.parametrize(
    ("num_right", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_interval_of_a_share_is_wilsons_on_newcombes_cases(num_right: int, n: int, expected: tuple[float, float]) -> None:
    pairs = make_pairs(["x"] * num_right + ["y"] * (n - num_right), ["x"] * n)
    score = Accuracy().score(Accuracy().statistics(pairs))["accuracy"]

    assert score.interval == pytest.approx(expected, abs=5e-5)
    assert (score.n, score.value) == (n, num_right / n)
    assert score.signature.endswith("|interval:wilson,0.95")


def test_items_asked_repeatedly_have_the_interval_of_resampled_items() -> None:
    often = 3 * Accuracy().statistics(make_pairs(["x"] * 5 + ["y"] * 5, ["x"] * 10))
    score = Accuracy().score(often)["accuracy"]

    assert (score.value, score.n) == (0.5, 10)
    assert score.signature.endswith("|interval:bootstrap,1000,0.95")


def test_an_exact_match_forgives_case_punctuation_and_articles() -> None:
    assert value(ExactMatch(), ["The Beatles!", "beatles", "a  Beatle"], ["beatles"] * 3, "exact_match") == pytest.approx(2 / 3)
    assert value(ExactMatch(normalise="none"), ["The Beatles!", "beatles"], ["beatles"] * 2, "exact_match") == 0.5
    assert normalise_answer("The cat, a hat: an anthem") == "cat hat anthem"


def test_the_f1_of_an_answer_is_that_of_its_words_against_the_best_reference() -> None:
    # SQuAD's script on "normans in france": 2 of 2 words right, 2 of 3 found.
    assert value(AnswerF1(), ["the Normans, France"], ["normans in france"], "answer_f1") == pytest.approx(0.8)
    assert value(AnswerF1(), ["x x y", "", "the"], [["x", "x x"], "x", "a"], "answer_f1") == pytest.approx((0.8 + 0 + 1) / 3)


def test_the_f1_of_labels_is_that_of_precision_and_recall_counted_one_by_one() -> None:
    generator = np.random.default_rng(0)
    right, said = (generator.choice([*LABELS, "?"][: 3 + extra], size=60).tolist() for extra in (0, 1))

    scores = LabelF1(labels=LABELS).score(LabelF1(labels=LABELS).statistics(make_pairs(said, right)))

    expected = {}
    for label in LABELS:
        both = sum(a == b == label for a, b in zip(right, said, strict=True))
        precision, recall = both / said.count(label), both / right.count(label)
        expected[f"f1_{label}"] = 2 * precision * recall / (precision + recall)
    hits = sum(a == b for a, b in zip(right, said, strict=True))
    precision, recall = hits / sum(label in LABELS for label in said), hits / 60
    expected |= {"f1_macro": np.mean(list(expected.values())), "f1_micro": 2 * precision * recall / (precision + recall)}
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected)
    assert all(score.interval[0] < score.value < score.interval[1] for score in scores.values())
    assert scores["f1_macro"].signature.startswith("metric:label_f1|labels:joy,anger,calm|refs:1|")


def test_a_label_that_is_nowhere_has_f1_zero() -> None:
    assert value(LabelF1(labels=LABELS), ["joy", "joy"], ["joy", "anger"], "f1_calm") == 0.0


@pytest.mark.parametrize(("right", "said"), product(LABELS, [*LABELS, "?"]))
def test_every_item_counts_once_for_the_label_that_was_right(right: str, said: str) -> None:
    hits, false_positives, misses = np.split(np.array(LabelF1(labels=LABELS).statistic(Pair(said, (right,)))), 3)

    assert (hits + misses).tolist() == [label == right for label in LABELS]
    assert (hits + false_positives).tolist() == [label == said for label in LABELS]


@pytest.mark.parametrize("references", [("fear",), ("joy", "anger")])
def test_a_reference_that_is_not_one_known_label_is_refused(references: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"unknown label\n  got: .*\n  allowed: one of joy, anger, calm"):
        LabelF1(labels=LABELS).statistics([Pair("joy", references)])


def test_labels_differ_from_each_other() -> None:
    with pytest.raises(ConfigError, match=r"labels: got .*; allowed: labels that differ"):
        validate(LabelF1, {"labels": ["a", "a"]}, "task.yaml")
