from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fakes import tiny_tokenizer
from powerhouse.errors import InputError
from powerhouse.prompting import Prompt, Template, slot_row

FELT = "I felt [MASK] after the movie: {text}"


def test_a_template_is_cut_at_its_slot_and_data_is_neither_field_nor_slot() -> None:
    prompt = Template(FELT + " {{}}").fill({"text": "[MASK] {text} {0}", "more": 1})

    assert prompt == Prompt("I felt ", " after the movie: [MASK] {text} {0} {}")


def test_the_guides_example_runs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "prompting.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", guide, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}

    exec(found[1], names)

    assert names["prompt"] == Prompt("I felt ", " after the movie: Two hours too long.")
    assert names["labels"].words == ("happy", "great", "sad")


def test_examples_stand_before_the_question_with_their_answers() -> None:
    template = Template("Review: {text}\nSentiment: [MASK]")

    prompt = template.fill({"text": "c"}, [({"text": "a"}, "good"), ({"text": "b"}, "bad")])

    assert prompt.before == "Review: a\nSentiment: good\n\nReview: b\nSentiment: bad\n\nReview: c\nSentiment: "


def test_in_a_chat_an_example_is_two_turns_and_the_answer_begins_after_the_last_one() -> None:
    template = Template("It is [MASK].", user="How is {text}?")

    prompt = template.fill({"text": "c"}, [({"text": "a"}, "good")])

    assert (prompt.before, prompt.after) == ("It is ", ".")
    assert [(turn["role"], turn["content"]) for turn in prompt.messages] == [
        ("user", "How is a?"), ("assistant", "It is good."), ("user", "How is c?")]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Review: {text}", "a template has one slot"),
        ("[MASK] or [MASK]: {text}", "a template has one slot"),
        ("It is [MASK].", "a template without a field"),
        ("{text} { [MASK]", "a brace that is no field"),
        ("{text.upper} [MASK]", "a field is a column's name in braces"),
        ("{text!r} [MASK]", "a field is a column's name in braces"),
        ("{text:>9} [MASK]", "a field is a column's name in braces"),
        ("{0} [MASK]", "a field is a column's name in braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Template(text)


def test_a_column_that_is_missing_is_named_beside_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no such column\n  got: text\n  allowed: review, label"):
        Template(FELT).fill({"review": "x", "label": "y"})


def test_blanks_at_the_slots_edge_are_tokens_of_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Template("{text} was [MASK] times").fill({"text": "It"})

    row = slot_row(tokenizer.encode_batch, prompt, "the worst of")

    assert [tokenizer.decode(part) for part in row] == ["It was", " the worst of", " times"]
    assert [*row.before, *row.answer, *row.after] == tokenizer.encode("It was the worst of times")


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        (Prompt("It was "), "", "an empty answer"),
        (Prompt("It was "), " ", "an empty answer"),
        (Prompt("It w"), "as", "merges an answer with the text beside it"),
        (Prompt("It was ", "imes"), "t", "merges an answer with the text beside it"),
    ],
)
def test_an_answer_without_tokens_of_its_own_is_refused(prompt: Prompt, answer: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        slot_row(tiny_tokenizer().encode_batch, prompt, answer)
