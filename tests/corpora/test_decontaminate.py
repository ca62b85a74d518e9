from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest

from powerhouse.corpora.decontaminate import (
    NUM_WORDS,
    Decontaminate,
    EvaluationSetConfig,
    Item,
    Ngrams,
    ReportContamination,
    digests,
    read_items,
)
from powerhouse.corpora.document import Draft, RawDocument
from powerhouse.errors import InputError

QUESTION = "Which of the two old towns on the river was first to have a bridge of stone, and who paid for it?"
ANSWER = "Neither: both bridges were built in one year by the same family of millers from the hills up north."


def write_set(folder: Path, name: str, content: str) -> EvaluationSetConfig:
    (folder / name).write_text(content)
    return EvaluationSetConfig(name=name.split(".")[0], path=folder / name)


def draft(text: str) -> Draft:
    return Draft(RawDocument(0, "text", ""), text)


def test_an_item_of_jsonl_is_every_string_in_it_or_the_named_fields(tmp_path: Path) -> None:
    record = {"id": 7, "question": QUESTION, "choices": {"text": ["No", ANSWER]}}
    config = write_set(tmp_path, "quiz.jsonl", json.dumps(record) + "\n\n")
    (item,) = read_items([config])
    assert [len(words) for words in item.texts] == [22, 1, 19]
    (named,) = read_items([config.model_copy(update={"fields": ["question"]})])
    assert [words[:3] for words in named.texts] == [["which", "of", "the"]]


def test_an_item_of_text_is_a_paragraph(tmp_path: Path) -> None:
    items = read_items([write_set(tmp_path, "quiz.txt", f"\n{QUESTION}\n{ANSWER}\n\n \nshort one\n")])
    assert [(item.number, len(item.texts[0]), item.has_ngram) for item in items] == [(1, 41, True), (2, 2, False)]


def test_thirteen_words_in_a_row_are_found_whatever_their_case_and_marks_and_twelve_are_not(tmp_path: Path) -> None:
    items = read_items([write_set(tmp_path, "quiz.txt", QUESTION)])
    step = Decontaminate(items)
    words = QUESTION.split()
    held = draft("It asks: " + " - ".join(words[4:17]).upper() + "!")
    step(held)
    assert held.columns == {"evaluation_items": [0]}
    assert held.rejection is not None
    assert held.rejection.reason == "contaminated"
    assert held.rejection.detail == "quiz item 1: old towns on the river was first to have a bridge of stone"
    clean = draft(" ".join(words[4:16]) + " brick " + " ".join(words[5:16]))
    step(clean)
    assert (clean.rejection, clean.columns) == (None, {"evaluation_items": []})


def test_the_items_found_are_those_of_a_plain_search_of_all_ngrams() -> None:
    random = Random(0)
    texts = [random.choices("abcd", k=random.randint(5, 60)) for _ in range(40)]
    items = [Item("set", number, [text[:30], text[30:]]) for number, text in enumerate(texts)]
    ngrams = Ngrams(items)
    num_found = 0
    for _ in range(60):
        parts = [random.choice(texts)[random.randint(0, 9) :][: random.randint(8, 25)] for _ in range(3)]
        document = [word for part in parts for word in part]
        runs = {tuple(document[start : start + NUM_WORDS]) for start in range(len(document) - NUM_WORDS + 1)}
        expected = [
            item.number
            for item in items
            if any(tuple(text[at : at + NUM_WORDS]) in runs for text in item.texts for at in range(len(text) - NUM_WORDS + 1))
        ]
        found = ngrams.find(document)
        assert [number for number, _ in found] == expected
        num_found += len(found)
    assert num_found > 30


def test_unknown_words_between_known_ones_are_no_hit() -> None:
    ngrams = Ngrams([Item("set", 1, [[f"w{number}" for number in range(13)]])])
    assert ngrams.find([f"w{number}" for number in range(13)]) == [(0, 0)]
    assert ngrams.find(["x", *(f"w{number}" for number in range(1, 13))]) == []
    assert ngrams.find([]) == []


def test_the_report_names_what_was_hit_of_each_set() -> None:
    items = [Item("one", number, [["w"] * size]) for number, size in enumerate((13, 20, 3), start=1)]
    items.append(Item("other", 1, [["v"] * 13]))
    index = pa.table({"evaluation_items": pa.array([[0], [], None, [0, 1], [3]], type=pa.list_(pa.int32()))})
    report = ReportContamination(items)(index).report
    assert report["one"] == {
        "items": 3,
        "items too short to be found": 1,
        "items found": 2,
        "documents left out": 2,
        "most found": {"item 1": 2, "item 2": 1},
    }
    assert (report["other"]["items found"], report["other"]["documents left out"]) == (1, 1)


BAD = [
    ("quiz.jsonl", '{"q": 1}\n{"q": ', [], "line 2 is not JSON"),
    ("quiz.jsonl", '{"q": 1}', ["answer"], r"line 1 lacks \['answer'\]\n  got: \['q'\]"),
    ("quiz.jsonl", "[" * 100_000, [], "line 1 is not JSON"),
    ("quiz.txt", "too short\n", [], "no item has 13 words"),
    ("quiz.csv", "a,b", [], r"unknown ending\n  got: quiz.csv\n  allowed: .jsonl, .txt"),
]


@pytest.mark.parametrize(("name", "content", "fields", "message"), BAD)
def test_a_bad_set_is_one_error(tmp_path: Path, name: str, content: str, fields: list[str], message: str) -> None:
    config = write_set(tmp_path, name, content).model_copy(update={"fields": fields})
    with pytest.raises(InputError, match=message):
        read_items([config])


def test_a_missing_or_foreign_file_is_one_error(tmp_path: Path) -> None:
    config = EvaluationSetConfig(name="quiz", path=tmp_path / "quiz.txt")
    with pytest.raises(InputError, match="evaluation set quiz: cannot be read"):
        digests([config])
    config.path.write_bytes(np.full(9, 255, dtype=np.uint8).tobytes())
    with pytest.raises(InputError, match="not UTF-8"):
        read_items([config])
