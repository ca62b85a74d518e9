from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from powerhouse.config import load
from powerhouse.corpora.classifier import Classifier
from powerhouse.corpora.document import Draft, RawDocument
from powerhouse.corpora.filters import RULES, Cut, QualityConfig
from powerhouse.corpora.language import Language
from powerhouse.corpora.scores import Score
from powerhouse.corpora.toxicity import RateSentences, Toxicity
from powerhouse.errors import ConfigError

GOOD = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.
We had everything before us, and we had nothing before us; we were all going direct to a better place.
There were a king with a large jaw and a queen with a plain face, on the throne of that country.
In both countries it was clearer than crystal to the lords of the state that things in general were settled for ever.
It was the year of our Lord one thousand seven hundred and seventy-five."""
LINES = GOOD.splitlines()
WORDS = ["the", "garden", "of", "roses", "lies", "behind", "a", "wall", "that", "nobody", "climbs", "with", "ease"]
NAMES = [
    "Ada",
    "Bo",
    "Cy",
    "Dee",
    "Eve",
    "Flo",
    "Gus",
    "Hal",
    "Ida",
    "Jo",
    "Kit",
    "Lou",
    "Max",
    "Ned",
    "Oz",
    "Pat",
    "Quin",
    "Ray",
]
REPEATS = GOOD + "\n" + " ".join(f"{name} saw ten red ships go far out to open sea" for name in NAMES)

TRIPS = {
    "repeated_paragraph_share": f"{GOOD}\n\nOne.\n\nOne.\n\nOne.",
    "repeated_paragraph_char_share": f"{GOOD}\n\n{LINES[0]}\n\n{LINES[3]}\n\n{LINES[0]}\n\n{LINES[3]}",
    "repeated_line_share": GOOD + "\nOne two." * 4,
    "repeated_line_char_share": "\n".join([GOOD, *LINES[:2]]),
    "top_2gram_char_share": GOOD + " seven dwarfs" * 30,
    "top_3gram_char_share": GOOD + " seven little dwarfs" * 30,
    "top_4gram_char_share": GOOD + " seven very little dwarfs" * 30,
    **{f"repeated_{length}gram_char_share": REPEATS for length in range(5, 11)},
    "too_few_words": "It was the best of times, and so it was of all the other things that men have ever known.",
    "too_many_words": " ".join(f"the {word} and leaf{number}" for number in range(3000) for word in WORDS),
    "short_words": "to be or no " * 30,
    "long_words": "the state of " + " ".join(f"{word}disestablishmentarians" for word in WORDS * 4),
    "symbols_per_word": GOOD.replace(" of ", " # of ") + " #" * 10,
    "ellipses_per_word": GOOD.replace(" of ", " ... of ") + " …" * 10,
    "bullet_line_share": "\n".join(f"- {line}" for line in LINES),
    "ellipsis_line_share": "\n".join(f"{line}..." for line in LINES),
    "few_alphabetic_words": GOOD + " 12 34 56" * 10,
    "few_stop_words": """Green ideas sleep furiously beside quiet rivers, under seven purple lamps. Old cats watch red birds fly
past my window each morning while rain falls on every empty street in town. Nobody goes out, so nobody sees how slowly our tall
trees grow, how many leaves lie on wet stones, or who walks home late at night.""",
    "lorem_ipsum": GOOD + " Lorem ipsum dolor sit amet.",
    "curly_brackets": GOOD + "\nint main() { return 0; }",
    "too_few_sentences": GOOD.replace("\n", " ").replace(".", ","),
    "few_line_ends": GOOD.replace(".", ","),
    "short_line_share": "\n".join([*LINES, *(f"This is line {name}." for name in NAMES)]),
    "repeated_char_share": "\n".join([*LINES, "This is it, then.", "This is it, then."]),
    "newlines_per_word": "\n".join(f"it was {name}" for name in NAMES * 2),
    "toxic_word_share": GOOD + " What the fuck is this shit, said the bastard, and so said we all." * 2,
    "worst_sentence_toxic_share": GOOD + " Fuck that shit, bastard, motherfucker.",
    "toxic_sentence_share": GOOD + " It was shit." * 9,
    "language_score": "It was the Zeit und es war the best of die Zeiten and l'age de la sagesse o il tempo del " * 4,
    "language": """Es war die beste und die schlimmste Zeit, ein Jahrhundert der Weisheit und des Unsinns,
eine Epoche des Glaubens und des Unglaubens, eine Periode des Lichts und der Finsternis:
es war der Frühling der Hoffnung und der Winter der Verzweiflung. Wir hatten alles, wir hatten nichts vor uns;
wir steuerten alle unmittelbar dem Himmel zu und wir gingen alle in die Hölle. And that was all there was to be said.""",
}
SCHEMA = [*Score.schema, *Language.schema, *Toxicity.schema, *RateSentences.schema]
# A model of two words: with "shit" a text is toxic for certain.
SMALL = Classifier({"was": 0, "shit": 1}, np.ones(2), np.array([[0.0], [9.0]]), *(np.array([[-3.0], [-1.0], [0.0]])))
OFF: dict[str, Any] = {
    field: -1.0 if field.startswith("min_") else 1e9
    for field in QualityConfig.model_fields
    if field.startswith(("min_", "max_"))
}


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    return [Score(), Language(), Toxicity(), RateSentences(SMALL)]


def reason_of(steps: list[Any], text: str, limits: QualityConfig, kind: str = "web") -> tuple[str | None, str | None]:
    draft = Draft(RawDocument(0, "text", text), text)
    for step in steps:
        step(draft)
    columns = {name: pa.array([value], type=dict(SCHEMA)[name]) for name, value in draft.columns.items()}
    index = pa.table({"reason": pa.array([None], type=pa.string()), "kind": [kind], **columns})
    removals = Cut(limits)(index).removals
    return (removals[0].reason, removals[0].detail) if removals else (None, None)


def only(reason: str) -> QualityConfig:
    """The limits of one rule, all others off."""
    mine = {rule.limit: QualityConfig.model_fields[rule.limit].default for rule in RULES if rule.reason == reason}
    languages = ["en"] if reason == "language" else ["en", "de", "fr", "it"]
    return QualityConfig.model_construct(**(OFF | mine | {"languages": languages, "web_kinds": ["web"]}))


def test_good_prose_passes_every_rule(steps: list[Any]) -> None:
    assert reason_of(steps, GOOD, QualityConfig()) == (None, None)


def test_every_rule_has_a_text_made_for_it_and_looks_at_a_score_of_its_own() -> None:
    assert {rule.reason for rule in RULES} | {"language"} == set(TRIPS)
    assert {rule.score for rule in RULES} == {name for name, _ in SCHEMA} - {"language", "worst_sentence_probability"}
    assert all(rule.limit in QualityConfig.model_fields for rule in RULES)


@pytest.mark.parametrize("reason", TRIPS)
def test_each_rule_alone_trips_on_the_text_made_for_it_and_not_on_good_prose(reason: str, steps: list[Any]) -> None:
    assert reason_of(steps, TRIPS[reason], only(reason))[0] == reason
    assert reason_of(steps, GOOD, only(reason))[0] is None


def test_with_all_rules_on_the_first_in_their_order_is_told(steps: list[Any]) -> None:
    assert reason_of(steps, TRIPS["repeated_line_char_share"], QualityConfig())[0] == "repeated_line_char_share"
    assert reason_of(steps, TRIPS["language"], QualityConfig())[0] == "language"


def test_rules_for_web_pages_leave_books_alone(steps: list[Any]) -> None:
    for rule in (rule for rule in RULES if rule.is_for_web):
        assert reason_of(steps, TRIPS[rule.reason], only(rule.reason), kind="book")[0] is None


def test_a_rule_tells_what_it_measured(steps: list[Any]) -> None:
    assert reason_of(steps, "Only the four words here.", QualityConfig()) == ("too_few_words", "5 < 50")


def test_a_document_left_out_before_is_not_looked_at_again() -> None:
    empty = {name: pa.array([None], type=kind) for name, kind in SCHEMA}
    index = pa.table({"reason": ["no_text"], "kind": ["web"], **empty})

    assert Cut(QualityConfig())(index).removals == []


def test_a_blank_document_is_rejected_without_scores() -> None:
    draft = Draft(RawDocument(0, "text", " \n"), " \n")
    Score()(draft)

    assert draft.rejection is not None
    assert (draft.rejection.reason, draft.columns) == ("no_text", {})


def test_another_language_passes_when_it_is_asked_for(steps: list[Any]) -> None:
    limits = QualityConfig(languages=["de"], min_stop_words=0, min_language_score=0.5)

    assert reason_of(steps, TRIPS["language"], limits, kind="book") == (None, None)


BAD_LIMITS = [
    ("languages=[]", "languages: got \\[\\]; allowed: list should have at least 1 item"),
    ("min_language_score=2", "min_language_score: got 2; allowed: input should be less than or equal to 1"),
    ("min_words=-1", "min_words: got -1"),
    ("min_word=3", "min_word: unknown key; did you mean min_words"),
]


@pytest.mark.parametrize(("override", "message"), BAD_LIMITS)
def test_a_bad_limit_is_one_readable_error(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(QualityConfig, None, [override])
