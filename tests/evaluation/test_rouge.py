"""ROUGE against Lin's examples, ROUGE-1.5.5's numbers and rouge-score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from powerhouse.config import validate
from powerhouse.errors import ConfigError
from powerhouse.evaluation.metric import Pair, make_pairs
from powerhouse.evaluation.rouge import Rouge
from powerhouse.evaluation.words import STEMMER_VERSION, common_length, common_places
from random_texts import random_pairs

PLAIN = Rouge(is_stemmed=False)


def scores(metric: Rouge, hypothesis: str, reference: str) -> dict[str, float]:
    found = metric.score(metric.statistics(make_pairs([hypothesis], [reference])))
    return {name: score.value for name, score in found.items()}


@pytest.mark.parametrize(("hypothesis", "longest"), [("police kill the gunman", 0.75), ("the gunman kill police", 0.5)])
def test_lins_police_and_gunman_differ_in_order_alone(hypothesis: str, longest: float) -> None:
    found = scores(PLAIN, hypothesis, "police killed the gunman")

    assert (found["rougeL"], found["rouge1"], found["rouge2"]) == pytest.approx((longest, 0.75, 1 / 3))


def test_lins_union_of_subsequences_has_his_recall() -> None:
    found = scores(PLAIN, "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")

    assert [found[name] for name in ("rougeLsum_recall", "rougeLsum_precision", "rougeLsum")] == pytest.approx(
        [0.8, 0.4, 8 / 15]
    )


@pytest.mark.parametrize(
    ("is_stemmed", "num_pairs"), [(False, 60), (True, 60), pytest.param(True, 1000, marks=pytest.mark.slow)]
)
def test_random_pairs_have_rouge_scores_numbers(is_stemmed: bool, num_pairs: int) -> None:
    pairs = random_pairs(num_pairs, max_lines=3)
    metric = Rouge(is_stemmed=is_stemmed, kinds=("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"))
    oracle = rouge_scorer.RougeScorer(list(metric.kinds), use_stemmer=is_stemmed)

    expected = [oracle.score_multi(pair.references, pair.hypothesis) for pair in pairs]

    flat = [[value for kind in metric.kinds for value in item[kind]] for item in expected]
    np.testing.assert_allclose(metric.statistics(pairs)[:, 3:], flat, atol=1e-9)
    found = metric.score(metric.statistics(pairs))
    for kind in metric.kinds:
        assert found[kind].value == pytest.approx(np.mean([item[kind].fmeasure for item in expected]), abs=1e-9)


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_the_bits_of_a_row_are_the_table_of_longest_common_subsequences(rows: list[str], columns: list[str]) -> None:
    table = np.zeros((len(rows) + 1, len(columns) + 1), dtype=int)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            table[i + 1, j + 1] = table[i, j] + 1 if row == column else max(table[i, j + 1], table[i + 1, j])

    assert common_length(rows, columns) == table[-1, -1]
    assert common_places(rows, columns) == rouge_scorer.lcs_ind(rows, columns)


@pytest.mark.parametrize(("hypothesis", "reference"), [("", "a word"), ("!?", "a word"), ("a word", "..."), ("\n\n", "a\nb")])
def test_a_text_without_words_has_nothing_in_common_with_any(hypothesis: str, reference: str) -> None:
    assert set(scores(PLAIN, hypothesis, reference).values()) == {0.0}


def test_the_signature_says_kinds_stems_and_where_sentences_end() -> None:
    rows = Rouge().statistics([Pair("a", ("a",))])

    assert (
        Rouge()
        .signature(rows)
        .startswith(
            f"metric:rouge|kinds:rouge1,rouge2,rougeL,rougeLsum|stems:{STEMMER_VERSION}|sentences:lines|best:f1|refs:1|"
        )
    )
    assert "|stems:none|" in PLAIN.signature(rows)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kinds\.0: got 'rougeW'; allowed: input should be 'rouge1'"):
        validate(Rouge, {"kinds": ["rougeW"]}, "task.yaml")
