from __future__ import annotations

import pytest

from powerhouse.corpora.bias import IDENTITY_TERMS
from powerhouse.corpora.document import Draft, RawDocument
from powerhouse.corpora.toxicity import Toxicity, lexicon

CALM = "The farmers stayed in their houses until the rain was over, and nobody said a word about the harvest. "


def shares(text: str) -> tuple[float, float]:
    draft = Draft(RawDocument(0, "text", text), text)
    Toxicity()(draft)
    return draft.columns["toxic_word_share"], draft.columns["worst_sentence_toxic_share"]


def test_density_and_worst_sentence_are_as_counted() -> None:
    density, worst = shares(CALM + "You fucking bastard, go away now!")

    assert density == pytest.approx(2 / 25)
    assert worst == pytest.approx(2 / 6)


def test_a_short_outcry_counts_as_five_words() -> None:
    assert shares(CALM + "Shit!")[1] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "text",
    [
        CALM,
        "",
        "The cock crowed at dawn on Monday.",
        "Jewish, gay, black and Muslim women spoke first.",
        "God damned them to hell, the preacher said.",
        "Scunthorpe and Essex are places in England.",
    ],
)
def test_words_on_people_places_and_faith_are_not_toxic(text: str) -> None:
    assert shares(text)[0] <= (1 / 7 if "cock" in text else 0)


def test_the_lexicon_names_no_group_of_people() -> None:
    assert len(lexicon()) > 400
    assert not lexicon() & IDENTITY_TERMS.keys()
