"""Tasks from a YAML file's values to scores, asked of a tiny model in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import tiny_decoder, tiny_tokenizer
from powerhouse.config import validate
from powerhouse.errors import ConfigError, InputError
from powerhouse.evaluation.families import PlainDecoder
from powerhouse.evaluation.plans import make_plan
from powerhouse.evaluation.reading import DecoderRespondent
from powerhouse.evaluation.results import Result, judge
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.prompting import CONTENT_FREE, Prompt

REVIEWS = [("it was the best", "good"), ("it was the worst", "bad"), ("age of wisdom", "good"), ("foolishness", "bad"),
           ("the dog sleeps", "good"), ("the fox jumps", "bad")]  # fmt: skip
POOL = [("lazy dog", "bad"), ("quick fox", "good"), ("my purse", "bad"), ("long ago", "good")]
LABELS = {"good": ["best", "wisdom"], "bad": ["the"]}
SENTIMENT: dict[str, Any] = {
    "kind": "label", "template": "Review: {text}\nIt was [MASK]", "labels": LABELS, "target": "label"}  # fmt: skip


@pytest.fixture(autouse=True)
def _data(tmp_path: Path) -> None:
    write_lines(tmp_path / "reviews.jsonl", [{"text": text, "label": label} for text, label in REVIEWS])
    write_lines(tmp_path / "pool.jsonl", [{"text": text, "label": label} for text, label in POOL])
    choices = [{"goal": text, "a": "the best of times", "b": "the worst", "right": 0} for text, _ in REVIEWS]
    write_lines(tmp_path / "choices.jsonl", choices)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(**task: Any) -> EvaluationConfig:
    values = {"data": "reviews.jsonl"} | task
    return validate(EvaluationConfig, {"model": "model", "output": "out", "tasks": {"task": values}}, "test.yaml")


def ask(config: EvaluationConfig) -> tuple[Any, Result, dict[str, Any]]:
    task = config.tasks["task"]
    plan = make_plan(task)
    plan.check(tiny_tokenizer().encode_batch)
    questions = list(plan.questions())
    respond = DecoderRespondent(PlainDecoder(tiny_decoder(max_position_embeddings=256), tiny_tokenizer()))
    replies = {question.key: reply for question, reply in zip(questions, respond(questions), strict=True)}
    return plan, judge(plan, task.used_metrics(), task.facts(), replies), replies


def logprobs(prompt: Prompt, answers: list[str]) -> np.ndarray[Any, Any]:
    model = PlainDecoder(tiny_decoder(max_position_embeddings=256), tiny_tokenizer())
    before = len(tiny_tokenizer().encode(prompt.before.rstrip()))
    rows = [tiny_tokenizer().encode(prompt.before + answer) for answer in answers]
    return np.array([sum(value for value, _ in row) for row in model.score(rows, [before] * len(rows))])


def by_hand(text: str, shots: str = "") -> np.ndarray[Any, Any]:
    """P(good), P(bad)."""
    words = np.exp(logprobs(Prompt(f"{shots}Review: {text}\nIt was "), ["best", "wisdom", "the"]))
    return np.array([words[0] + words[1], words[2]]) / words.sum()


def test_a_label_is_chosen_by_the_probability_of_its_words() -> None:
    _, result, _ = ask(config_of(**SENTIMENT))

    expected = [by_hand(text) for text, _ in REVIEWS]
    for sample, probabilities in zip(result.samples, expected, strict=True):
        assert list(sample["details"][0]["probabilities"].values()) == pytest.approx(probabilities, abs=1e-5)
    is_right = [["good", "bad"][int(p.argmax())] == label for p, (_, label) in zip(expected, REVIEWS, strict=True)]
    assert result.scores["accuracy"].value == np.mean(is_right)
    assert result.scores["accuracy"].n == len(REVIEWS)
    assert "labels:good=best,wisdom;bad=the|calibrated:False|examples:0" in result.scores["accuracy"].signature
    assert {"f1_macro", "f1_good", "f1_bad"} < set(result.scores)


def test_calibration_divides_by_what_items_without_content_get() -> None:
    _, result, _ = ask(config_of(**SENTIMENT, calibrated=True))

    bias = np.mean([by_hand(text) for text in CONTENT_FREE], axis=0)
    for sample, (text, _) in zip(result.samples, REVIEWS, strict=True):
        expected = by_hand(text) / bias
        probabilities = list(sample["details"][0]["probabilities"].values())
        assert probabilities == pytest.approx(expected / expected.sum(), abs=1e-5)


def test_examples_in_several_orders_are_scored_alone_and_together_over_items() -> None:
    examples = {"data": "pool.jsonl", "num": 2, "num_orders": 2, "seed": 3}
    plan, result, _ = ask(config_of(**SENTIMENT, examples=examples, metrics=[{"metric": "accuracy"}]))

    orders = [result.scores[f"accuracy, order {order}"] for order in (1, 2)]
    assert result.scores["accuracy"].value == pytest.approx(np.mean([score.value for score in orders]))
    assert {score.n for score in result.scores.values()} == {len(REVIEWS)}
    assert set(result.scores) == {"accuracy", "accuracy, order 1", "accuracy, order 2"}
    first, second = [question.prompt.before for question in list(plan.questions())[:2]]
    blocks = first.split("\n\n")
    assert second.split("\n\n") == [blocks[1], blocks[0], blocks[2]]
    assert {block.split("It was ")[1] for block in blocks[:2]} == {"best", "the"}
    shown = by_hand(REVIEWS[0][0], "\n\n".join(blocks[:2]) + "\n\n")
    assert list(result.samples[0]["details"][0]["probabilities"].values()) == pytest.approx(shown, abs=1e-5)


def test_the_nearest_examples_are_those_of_each_item() -> None:
    plan, _, _ = ask(config_of(**SENTIMENT, examples={"data": "pool.jsonl", "num": 1, "choice": "nearest"}))

    shown = [question.prompt.before.split("\n")[0] for question in plan.questions()]
    assert shown[4:] == ["Review: lazy dog", "Review: quick fox"]


@pytest.mark.parametrize("per", ["answer", "character", "byte", "token"])
def test_the_likeliest_of_an_items_own_answers(per: str) -> None:
    task = {"kind": "choice", "data": "choices.jsonl", "template": "{goal} [MASK]", "choices": ["a", "b"], "target": "right"}
    _, result, _ = ask(config_of(**task, per=per))

    answers = ["the best of times", "the worst"]
    num_tokens = [len(tiny_tokenizer().encode(f" {answer}")) for answer in answers]
    lengths = {"answer": [1, 1], "character": [17, 9], "byte": [17, 9], "token": num_tokens}[per]
    for sample, (text, _) in zip(result.samples, REVIEWS, strict=True):
        assert sample["said"] == [str(int(np.argmax(logprobs(Prompt(f"{text} "), answers) / lengths)))]
        assert sample["right"] == ["0"]


def test_a_written_text_is_held_against_its_references() -> None:
    task = {"kind": "write", "template": "{text} [MASK]", "references": ["label"], "metrics": [{"metric": "exact_match"}]}
    _, result, _ = ask(config_of(**task, writing={"max_tokens": 4}))

    model = PlainDecoder(tiny_decoder(max_position_embeddings=256), tiny_tokenizer())
    rows = tiny_tokenizer().encode_batch([text for text, _ in REVIEWS])
    texts = model.write(rows, max_tokens=4, temperature=0, stop=(), seed=0)
    assert [sample["said"] for sample in result.samples] == [[text.strip()] for text in texts]
    assert set(result.scores) == {"exact_match"}


def test_bits_per_byte_of_texts_is_their_nats_over_their_bytes() -> None:
    _, result, replies = ask(config_of(kind="read"))

    nats = sum(reply["nats"] for reply in replies.values())
    num_bytes = sum(len(text) for text, _ in REVIEWS)
    assert result.scores["bits_per_byte"].value == pytest.approx(nats / np.log(2) / num_bytes)
    assert result.scores["word_perplexity"].value == pytest.approx(np.exp(nats / sum(len(text.split()) for text, _ in REVIEWS)))
    assert result.samples[0]["good"] == -result.samples[0]["values"]["bits_per_byte"]


def test_the_same_question_is_asked_once() -> None:
    config = config_of(**SENTIMENT, calibrated=True)
    questions = list(make_plan(config.tasks["task"]).questions())

    assert len(questions) == 4 * len(REVIEWS)
    assert len({question.key for question in questions}) == len(REVIEWS) + len(CONTENT_FREE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "Review: {text}"}, "a template has one slot"),
        ({"template": "{review} [MASK]"}, r"row 1 lacks a column\n  got: no review\n  allowed: a row has text, label"),
        ({"target": "sentiment"}, r"row 1 lacks a column\n  got: no sentiment"),
        ({"labels": {"good": ["best"], "worse": ["the"]}}, r"row 2: a label that the verbalizer has no word for\n  got: 'bad'"),
        ({"labels": {"good": ["best"], "bad": ["the", "the worst"]}}, "a word begins with another one of its label"),
        ({"labels": {"good": ["wisdom"], "bad": ["wide"]}}, "two labels share a first token"),
        ({"data": "nowhere.jsonl"}, "no such data file"),
        ({"data": "reviews.txt"}, r"unknown kind of data file\n  got: .txt\n  allowed: .jsonl, .csv, .tsv, .parquet"),
        ({"examples": {"data": "pool.jsonl", "num": 9}}, "more examples than there are"),
        ({"examples": {"data": "pool.jsonl", "num": 2, "num_orders": 5}}, "2 examples have fewer orders"),
    ],
)
def test_a_task_that_does_not_fit_its_data_or_the_tokenizer_is_refused_before_anything_is_asked(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(config_of(**SENTIMENT | changes).tasks["task"]).check(tiny_tokenizer().encode_batch)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"', "damaged data file"),
        ("[1]\n", "a line is no JSON object"),
        ("\n", "no rows"),
    ],
)
def test_a_damaged_data_file_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "reviews.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        make_plan(config_of(**SENTIMENT).tasks["task"])


def test_an_answer_that_is_not_among_the_choices_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "choices.jsonl", [{"goal": "x", "a": "y", "b": "z", "right": 2}])
    task = {"kind": "choice", "data": "choices.jsonl", "template": "{goal} [MASK]", "choices": ["a", "b"], "target": "right"}
    with pytest.raises(InputError, match=r"row 1: unknown label\n  got: right='2'\n  allowed: 0 to 1, or one of the answers"):
        make_plan(config_of(**task).tasks["task"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": {"t": SENTIMENT | {"kind": "labels", "data": "x.csv"}}}, "kind"),
        ({"tasks": {"t": SENTIMENT | {"data": "x.csv", "metrics": [{"metric": "acuracy"}]}}}, "acuracy"),
        ({"endpoint": {"url": "http://x/v1", "model": "m"}}, "either model, a directory, or endpoint"),
        ({"tasks": {"a/b": SENTIMENT | {"data": "x.csv"}}}, "tasks.a/b"),
        ({"corpus": "x"}, "corpus and tokens together"),
        ({}, "tasks, or a corpus with its tokens"),
    ],
)
def test_settings_that_say_too_little_or_too_much_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(EvaluationConfig, {"model": "model", "output": "out"} | values, "test.yaml")


def test_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in REVIEWS))
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in REVIEWS))
    pq.write_table(pa.table({"text": [t for t, _ in REVIEWS], "label": [k for _, k in REVIEWS]}), tmp_path / "reviews.parquet")

    plans = [
        make_plan(config_of(**SENTIMENT, data=f"reviews.{kind}").tasks["task"]) for kind in ("jsonl", "csv", "tsv", "parquet")
    ]

    assert all(plan.rows == plans[0].rows for plan in plans)
