"""The limits that a document must keep: each rule looks at one stored score and gives nothing, or the reason to leave it out.

Scores are columns, so that other limits need no text: a corpus is cut anew in seconds. Limits are those of Gopher (Rae et al.
2021, appendix A.1.1 and table A1), C4 (Raffel et al. 2019, section 2.2) and FineWeb (Penedo et al. 2024, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from powerhouse.config import Config
from powerhouse.corpora.document import Kind, Outcome, Removal
from powerhouse.corpora.words import STOP_WORDS


class QualityConfig(Config):
    """Limits of the rules; a document outside any of them is left out."""

    min_words: int = Field(default=50, ge=0)
    """Fewest words, Gopher."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words, Gopher."""
    min_mean_word_chars: float = Field(default=3, ge=0)
    """Lowest mean length of a word in characters, Gopher."""
    max_mean_word_chars: float = Field(default=10, gt=0)
    """Highest mean length of a word in characters, Gopher."""
    max_symbols_per_word: float = Field(default=0.1, ge=0)
    """Most hash signs to a word, Gopher."""
    max_ellipses_per_word: float = Field(default=0.1, ge=0)
    """Most ellipses to a word, Gopher."""
    max_bullet_line_share: float = Field(default=0.9, ge=0, le=1)
    """Highest share of lines that open with a bullet, Gopher."""
    max_ellipsis_line_share: float = Field(default=0.3, ge=0, le=1)
    """Highest share of lines that end in an ellipsis, Gopher."""
    min_alphabetic_word_share: float = Field(default=0.8, ge=0, le=1)
    """Lowest share of words, punctuation marks included, with at least one letter, Gopher."""
    min_stop_words: int = Field(default=2, ge=0, le=len(STOP_WORDS))
    """Fewest different words out of the, be, to, of, and, that, have, with; Gopher. Set 0 for a language other than English."""
    max_repeated_paragraph_share: float = Field(default=0.3, ge=0, le=1)
    """Highest share of paragraphs that came before, Gopher."""
    max_repeated_paragraph_char_share: float = Field(default=0.2, ge=0, le=1)
    """Highest share of characters in paragraphs that came before, Gopher."""
    max_repeated_line_share: float = Field(default=0.3, ge=0, le=1)
    """Highest share of lines that came before, Gopher."""
    max_repeated_line_char_share: float = Field(default=0.2, ge=0, le=1)
    """Highest share of characters in lines that came before, Gopher."""
    max_top_2gram_char_share: float = Field(default=0.20, ge=0)
    """Highest share of characters in the most frequent pair of words, Gopher."""
    max_top_3gram_char_share: float = Field(default=0.18, ge=0)
    """Highest share of characters in the most frequent run of 3 words, Gopher."""
    max_top_4gram_char_share: float = Field(default=0.16, ge=0)
    """Highest share of characters in the most frequent run of 4 words, Gopher."""
    max_repeated_5gram_char_share: float = Field(default=0.15, ge=0, le=1)
    """Highest share of characters in runs of 5 words that came before, Gopher."""
    max_repeated_6gram_char_share: float = Field(default=0.14, ge=0, le=1)
    """The same for runs of 6 words."""
    max_repeated_7gram_char_share: float = Field(default=0.13, ge=0, le=1)
    """The same for runs of 7 words."""
    max_repeated_8gram_char_share: float = Field(default=0.12, ge=0, le=1)
    """The same for runs of 8 words."""
    max_repeated_9gram_char_share: float = Field(default=0.11, ge=0, le=1)
    """The same for runs of 9 words."""
    max_repeated_10gram_char_share: float = Field(default=0.10, ge=0, le=1)
    """The same for runs of 10 words."""
    max_lorem_ipsum_lines: int = Field(default=0, ge=0)
    """Most lines with the filler text, C4: such a page is a template."""
    web_kinds: list[Kind] = Field(default=["web", "other"])
    """Kinds of source under the rules that were made for web pages: the rest of C4's and all of FineWeb's, below."""
    max_curly_bracket_lines: int = Field(default=0, ge=0)
    """Most lines with a curly bracket, C4: such a page is mostly code."""
    min_sentences: int = Field(default=5, ge=0)
    """Fewest sentences in lines of three words or more, C4."""
    min_line_end_share: float = Field(default=0.12, ge=0, le=1)
    """Lowest share of lines that end with a mark that ends a sentence, FineWeb."""
    max_short_line_share: float = Field(default=0.67, ge=0, le=1)
    """Highest share of lines of at most 30 characters, FineWeb."""
    max_repeated_char_share: float = Field(default=0.01, ge=0, le=1)
    """Highest share of characters in lines that came before, FineWeb."""
    max_newlines_per_word: float = Field(default=0.3, ge=0)
    """Most line breaks to a word, FineWeb."""
    max_toxic_word_share: float = Field(default=0.02, ge=0, le=1)
    """Highest share of words of the toxic lexicon (toxicity.py)."""
    max_worst_sentence_toxic_share: float = Field(default=0.5, ge=0, le=1)
    """Highest share of such words in one sentence, which counts as one of five words at least."""
    max_toxic_sentence_share: float = Field(default=0.1, ge=0, le=1)
    """Highest share of sentences that the lexicon and the classifier call toxic; only with `rates_sentences`."""
    languages: list[str] = Field(default=["en"], min_length=1)
    """ISO 639-1 codes of the languages to keep."""
    min_language_score: float = Field(default=0.65, ge=0, le=1)
    """Lowest probability of the language (RefinedWeb's and FineWeb's 0.65)."""


@dataclass(frozen=True)
class Rule:
    """One limit on one score."""

    reason: str
    score: str
    limit: str
    """Name of the field of QualityConfig; a value below a min_ or above a max_ field is out."""
    is_for_web: bool = False

    @property
    def side(self) -> Literal["min", "max"]:
        return "min" if self.limit.startswith("min_") else "max"


def _highest(score: str, *, is_for_web: bool = False) -> Rule:
    return Rule(score, score, f"max_{score.removeprefix('num_')}", is_for_web)


RULES: tuple[Rule, ...] = (
    Rule("too_few_words", "num_words", "min_words"),
    Rule("too_many_words", "num_words", "max_words"),
    *map(_highest, (
        "repeated_paragraph_share", "repeated_paragraph_char_share", "repeated_line_share", "repeated_line_char_share",
        "top_2gram_char_share", "top_3gram_char_share", "top_4gram_char_share",
        "repeated_5gram_char_share", "repeated_6gram_char_share", "repeated_7gram_char_share",
        "repeated_8gram_char_share", "repeated_9gram_char_share", "repeated_10gram_char_share",
    )),
    Rule("short_words", "mean_word_chars", "min_mean_word_chars"),
    Rule("long_words", "mean_word_chars", "max_mean_word_chars"),
    *map(_highest, ("symbols_per_word", "ellipses_per_word", "bullet_line_share", "ellipsis_line_share")),
    Rule("few_alphabetic_words", "alphabetic_word_share", "min_alphabetic_word_share"),
    Rule("few_stop_words", "num_stop_words", "min_stop_words"),
    Rule("lorem_ipsum", "num_lorem_ipsum_lines", "max_lorem_ipsum_lines"),
    Rule("curly_brackets", "num_curly_bracket_lines", "max_curly_bracket_lines", is_for_web=True),
    Rule("too_few_sentences", "num_sentences", "min_sentences", is_for_web=True),
    Rule("few_line_ends", "line_end_share", "min_line_end_share", is_for_web=True),
    _highest("short_line_share", is_for_web=True),
    _highest("repeated_char_share", is_for_web=True),
    _highest("newlines_per_word", is_for_web=True),
    *map(_highest, ("toxic_word_share", "worst_sentence_toxic_share", "toxic_sentence_share")),
    Rule("language_score", "language_score", "min_language_score"),
)  # fmt: skip
"""In the order in which they are asked; the first reason found is the one told."""


class Cut:
    """The corpus step: it leaves out what is outside the limits, by the scores alone."""

    name = "quality"

    def __init__(self, limits: QualityConfig) -> None:
        self._limits = limits

    def __call__(self, index: pa.Table) -> Outcome:
        return Outcome(list(self._removals(index)))

    def _removals(self, index: pa.Table) -> Iterator[Removal]:
        is_left = pc.is_null(index["reason"]).to_numpy()
        is_web = pc.is_in(index["kind"], pa.array(self._limits.web_kinds, type=pa.string())).to_numpy()
        for rule in (rule for rule in RULES if rule.score in index.column_names):
            values, limit = index[rule.score].to_numpy(), np.float32(getattr(self._limits, rule.limit))
            is_out = (values < limit) if rule.side == "min" else (values > limit)
            for row in np.flatnonzero(is_out & is_left & (is_web | (not rule.is_for_web))):
                sign = "<" if rule.side == "min" else ">"
                yield Removal(int(row), rule.reason, f"{values[row]:.4g} {sign} {limit:g}")
                is_left[row] = False
        is_other = ~pc.is_in(index["language"], pa.array(self._limits.languages)).to_numpy() & is_left
        for row in np.flatnonzero(is_other):
            language, score = (index[name][int(row)].as_py() for name in ("language", "language_score"))
            yield Removal(int(row), "language", f"{language} {score:.2f}")
