"""Toxicity by a lexicon: how dense its words stand in the text, and in the worst sentence; if asked, with a second opinion.

The words are those of the package better-profanity (MIT), less every word that names a group of people: a text is not toxic for
whom it is about, and the bias audit watches that. A lexicon sees words and no meaning: it finds obscenity, and misses
contempt put politely. The second opinion is a classifier's (classifier.py), on each sentence that has such a word: alone it is
no better; both together flag 0.21% of the sentences of plays, the lexicon alone 0.73% (docs/decisions/011).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import pyarrow as pa

from powerhouse.corpora.bias import IDENTITY_TERMS
from powerhouse.corpora.classifier import Classifier, Floats
from powerhouse.corpora.document import Columns, Draft

_SENTENCE = re.compile(r"[^.!?\n]+")
_WORD = re.compile(r"\w+")
_MIN_SENTENCE_WORDS = 5
_MIN_PROBABILITY = 0.7
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


class RateSentences:
    """The document step: which sentences are toxic to the lexicon and, with a probability of 0.7, to the classifier."""

    schema: Columns = (("toxic_sentence_share", pa.float32()), ("worst_sentence_probability", pa.float32()))

    def __init__(self, classify: Callable[[Sequence[str]], Floats] | None = None) -> None:
        self._classify = Classifier.load() if classify is None else classify
        self._lexicon = lexicon()

    def __call__(self, draft: Draft) -> None:
        probabilities, num_sentences = np.zeros(1), 0
        if not self._lexicon.isdisjoint(draft.view.normalised_words):
            sentences = [sentence for sentence in _SENTENCE.findall(draft.text) if _WORD.search(sentence)]
            num_sentences = len(sentences)
            suspects = [each for each in sentences if not self._lexicon.isdisjoint(_WORD.findall(each.lower()))]
            probabilities = self._classify(suspects)
        draft.columns |= {
            "toxic_sentence_share": int((probabilities >= _MIN_PROBABILITY).sum()) / max(1, num_sentences),
            "worst_sentence_probability": float(probabilities.max()),
        }
