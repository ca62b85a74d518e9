from __future__ import annotations

from pathlib import Path

import pytest

from powerhouse.config import load
from powerhouse.corpora.filters import RULES, Language, QualityConfig, first_rejection
from powerhouse.corpora.view import DocumentView
from powerhouse.errors import ConfigError

GOOD = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.
We had everything before us, and we had nothing before us; we were all going direct to a better place.
There were a king with a large jaw and a queen with a plain face, on the throne of that country.
In both countries it was clearer than crystal to the lords of the state that things in general were settled for ever."""

WORDS = ["the", "garden", "of", "roses", "lies", "behind", "a", "wall", "that", "nobody", "climbs", "with", "ease"]


TRIPS = {
    "no_text": " \n\t\n",
    "too_few_words": "It was the best of times, and so it was of all the other things that men have ever known.",
    "too_many_words": " ".join(f"the {word} and leaf{number}" for number in range(3000) for word in WORDS),
    "mean_word_length": "the state of " + " ".join(f"{word}-disestablishmentarians" for word in WORDS * 4),
    "symbols": GOOD.replace(" of ", " # of ") + " #" * 10,
    "bullet_lines": "\n".join(f"- {line}" for line in GOOD.replace(",", "\n").splitlines()),
    "ellipsis_lines": "\n".join(f"{line}..." for line in GOOD.splitlines()),
    "alphabetic_words": GOOD + " 12 34 56" * 10,
    "stop_words": """Green ideas sleep furiously beside quiet rivers, under seven purple lamps. Old cats watch red birds fly
past my window each morning while rain falls on every empty street in town. Nobody goes out, so nobody sees how slowly our tall
trees grow, how many leaves lie on wet stones, or who walks home late at night.""",
    "repeated_lines": GOOD + "\n" + GOOD.splitlines()[0] + "\n" + GOOD.splitlines()[1],
    "top_bigram": GOOD + " seven dwarfs" * 30,
    "lorem_ipsum": GOOD + " Lorem ipsum dolor sit amet.",
    "language": """Es war die beste und die schlimmste Zeit, ein Jahrhundert der Weisheit und des Unsinns,
eine Epoche des Glaubens und des Unglaubens, eine Periode des Lichts und der Finsternis:
es war der Frühling der Hoffnung und der Winter der Verzweiflung. Wir hatten alles, wir hatten nichts vor uns;
wir steuerten alle unmittelbar dem Himmel zu und wir gingen alle in die Hölle. And that was all there was to be said.""",
}


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


def test_good_prose_passes_every_rule(language: Language) -> None:
    assert first_rejection(DocumentView(GOOD), QualityConfig(), language) is None


@pytest.mark.parametrize("reason", TRIPS)
def test_each_rule_trips_on_the_text_made_for_it(reason: str, language: Language) -> None:
    found = first_rejection(DocumentView(TRIPS[reason]), QualityConfig(), language)
    assert found is not None
    assert found.reason == reason, found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_trips_on_one_of_those_texts_alone(rule) -> None:
    texts = {reason: text for reason, text in TRIPS.items() if text.strip()}
    tripped = [reason for reason, text in texts.items() if rule(DocumentView(text), QualityConfig())]
    assert tripped == [rule.__name__]


def test_a_rule_tells_what_it_measured(language: Language) -> None:
    found = first_rejection(DocumentView("Only four words here."), QualityConfig(), language)
    assert found is not None
    assert found.detail == "4 < 50"


def test_another_language_passes_when_it_is_asked_for(language: Language) -> None:
    german = "Es war die beste und die schlimmste Zeit, ein Jahrhundert der Weisheit und des Unsinns. " * 5
    limits = QualityConfig(languages=["de"], min_stop_words=0, max_top_bigram_char_share=1)
    assert first_rejection(DocumentView(german), limits, language) is None


BAD_LIMITS = [
    ("languages=[]", "languages: got \\[\\]; allowed: list should have at least 1 item"),
    ("min_language_score=2", "min_language_score: got 2; allowed: input should be less than or equal to 1"),
    ("min_words=0", "min_words: got 0"),
    ("min_word=3", "min_word: unknown key; did you mean min_words"),
]


@pytest.mark.parametrize(("override", "message"), BAD_LIMITS)
def test_a_bad_limit_is_one_readable_error(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(QualityConfig, None, [override])
