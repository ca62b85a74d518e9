from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from powerhouse.errors import InputError
from powerhouse.evaluation.labels import Accuracy, AnswerF1
from powerhouse.evaluation.metric import Pair, Part, make_pairs, merge
from powerhouse.evaluation.metrics import AnyMetric
from powerhouse.evaluation.score import resample, total

PAIRS = make_pairs(["a b", "b", "", "c d e", "a"] * 8, ["a b c", "b", "c", ["c d", "e d c"], "b"] * 8)
NAMES = {"accuracy", "exact_match", "answer_f1", "label_f1", "bleu", "rouge", "meteor", "bertscore"}
FURTHER = {"label_f1": {"labels": ["a", "b"]}}


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_any_split_merged_in_any_order_gives_the_same_rows_and_scores_to_the_bit(random: object, num_parts: int) -> None:
    metric = AnswerF1()
    whole = metric.statistics(PAIRS)
    numbers = np.arange(len(PAIRS))
    random.shuffle(numbers)
    parts = [Part(some, metric.statistics([PAIRS[i] for i in some])) for some in np.array_split(numbers, num_parts)]
    random.shuffle(parts)

    merged = merge(parts)

    assert merged.numbers_N.tolist() == list(range(len(PAIRS)))
    assert merged.sums_NS.tobytes() == whole.tobytes()


def test_merging_is_associative_and_an_empty_part_changes_nothing() -> None:
    sums_NS = AnswerF1().statistics(PAIRS)
    one, two, three = (Part(numbers, sums_NS[numbers]) for numbers in np.array_split(np.arange(len(PAIRS)), 3))
    empty = Part(np.array([], dtype=np.int64), np.empty((0, 4)))

    pairwise, at_once = merge([merge([three, one]), empty, two]), merge([one, two, three])

    assert pairwise.sums_NS.tobytes() == at_once.sums_NS.tobytes() == sums_NS.tobytes()


def test_the_total_is_the_same_to_the_bit_in_any_order_of_the_items() -> None:
    sums_NS = np.random.default_rng(0).uniform(size=(1000, 3)) ** 20
    orders = [np.random.default_rng(seed).permutation(1000) for seed in range(20)]

    assert len({total(sums_NS[order]).tobytes() for order in orders}) == 1
    assert len({sums_NS[order].sum(axis=0).tobytes() for order in orders}) > 1


def test_a_resample_draws_as_many_items_as_there_are() -> None:
    sums_NS = np.column_stack([np.ones(50), np.arange(50.0)])

    resampled_RS = resample(sums_NS, seed=0)

    assert resampled_RS.shape == (1000, 2)
    assert set(resampled_RS[:, 0]) == {50.0}
    assert resampled_RS[:, 1].std() == pytest.approx(np.sqrt(50) * np.arange(50).std(), rel=0.1)


def test_resampling_in_blocks_is_resampling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums_NS = np.random.default_rng(0).integers(0, 9, size=(50, 2)).astype(float)
    at_once = resample(sums_NS, seed=3)
    monkeypatch.setattr("powerhouse.evaluation.score._BLOCK_COUNTS", 333)

    assert resample(sums_NS, seed=3).tobytes() == at_once.tobytes()


def test_the_signature_says_every_setting_and_the_number_of_references() -> None:
    same, other = make_pairs(["a", "b"], [["a", "c"], ["b", "d"]]), make_pairs(["a", "b"], [["a", "c"], "b"])
    metric = Accuracy()

    assert metric.signature(metric.statistics(same)).startswith("metric:accuracy|refs:2|version:")
    assert metric.signature(metric.statistics(other)).startswith("metric:accuracy|refs:var|version:")


ROW = AnswerF1().statistics([Pair("a", ("a",))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_pairs(["a", "b"], ["a"]), "do not match\n  got: 2 hypotheses, 1 items with references"),
        (lambda: make_pairs([], []), "no item to score"),
        (lambda: make_pairs(["a"], [[]]), "item 0: no reference"),
        (lambda: make_pairs(["a", "b"], ["a", " "]), "item 1: an empty reference\n  got: ' '"),
        (lambda: make_pairs(["a"], [["a", ""]]), "item 0: an empty reference\n  got: ''"),
        (lambda: make_pairs([None], ["a"]), "item 0: the hypothesis is no text\n  got: None"),
        (lambda: make_pairs(["a"], [[3]]), "item 0: an empty reference\n  got: 3"),
        (lambda: merge([]), "no item to score"),
        (lambda: merge([Part(np.array([4]), ROW), Part(np.array([4]), ROW)]), "an item was scored twice\n  got: item 4"),
        (lambda: AnswerF1().score(np.empty((0, 4))), "no item to score"),
    ],
)
def test_bad_input_is_one_clear_error(call: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)


def test_the_guides_example_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8").split("## Models on tasks")[0]
    [example] = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)

    exec(example, {})

    score, comparison = capsys.readouterr().out.splitlines()
    assert re.match(r"value=63\.98\d+ interval=\(\S+, 100\.0\) n=2 signature='metric:bleu\|", score)
    assert "p_value=" in comparison


def test_every_metric_has_a_line_in_the_guide_and_a_place_in_a_task() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8").split("## Models on tasks")[0]
    names = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `[^|]*\|", page, flags=re.MULTILINE))))
    read = TypeAdapter(AnyMetric)

    assert {name for name in names if read.validate_python({"metric": name} | FURTHER.get(name, {})).metric == name} == NAMES
