"""Toxicity by a lexicon: how dense its words stand in the text, and in the worst sentence of it.

The words are those of the package better-profanity (MIT), less every word that names a group of people: a text is not toxic for
whom it is about, and the bias audit watches that. A lexicon sees words and no meaning: it finds obscenity, and misses
contempt put politely.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

import pyarrow as pa

from powerhouse.corpora.bias import IDENTITY_TERMS
from powerhouse.corpora.document import Columns, Draft

_SENTENCE = re.compile(r"[^.!?\n]+")
_WORD = re.compile(r"\w+")
_MIN_SENTENCE_WORDS = 5
_NO_INSULTS = frozenset(
    [
        "god",
        "hell",
        "damn",
        "lust",
        "kill",
        "murder",
        "sex",
        "breast",
        "breasts",
        "weed",
        "drunk",
        "fat",
        "stupid",
        "ugly",
        "virgin",
    ]
)


@cache
def lexicon() -> frozenset[str]:
    """Give the toxic words, in lower case."""
    listed = files("better_profanity").joinpath("profanity_wordlist.txt").read_text(encoding="utf-8").lower().split("\n")
    return frozenset(word for word in listed if _WORD.fullmatch(word)) - IDENTITY_TERMS.keys() - _NO_INSULTS


class Toxicity:
    """The document step."""

    schema: Columns = (("toxic_word_share", pa.float32()), ("worst_sentence_toxic_share", pa.float32()))

    def __init__(self) -> None:
        self._lexicon = lexicon()

    def __call__(self, draft: Draft) -> None:
        words = draft.view.normalised_words
        num_toxic = sum(map(self._lexicon.__contains__, words))
        draft.columns |= {
            "toxic_word_share": num_toxic / max(1, len(words)),
            "worst_sentence_toxic_share": self._worst_sentence(draft.text) if num_toxic else 0.0,
        }

    def _worst_sentence(self, text: str) -> float:
        """Give the highest share of toxic words; a sentence of fewer than five words counts as one of five."""
        sentences = (_WORD.findall(sentence.lower()) for sentence in _SENTENCE.findall(text))
        shares = (sum(map(self._lexicon.__contains__, words)) / max(_MIN_SENTENCE_WORDS, len(words)) for words in sentences)
        return max(shares, default=0.0)
