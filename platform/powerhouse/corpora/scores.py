"""Every statistic that the rules cut by, computed once for each document and stored; the cuts come later, in filters.py.

Sources: Gopher = Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1 and table A1; C4 = Raffel et al. 2019 (arXiv 1910.10683),
section 2.2; FineWeb = Penedo et al. 2024 (arXiv 2406.17557), section 3.5. Words are those of words.py. Characters of n-grams
are counted as datatrove does, for whose counts the published thresholds were set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from powerhouse.corpora.document import Columns, Draft, Rejection
from powerhouse.corpora.words import (
    ENDS_SENTENCE,
    FIRST_STOP_WORD,
    HAS_LETTER,
    IS_OTHER_MARK,
    IS_WORD,
    LENGTH_SHIFT,
    MAX_CHUNK_CHARS,
    Numbers,
    Words,
)

TOP_NGRAMS = (2, 3, 4)
REPEATED_NGRAMS = (5, 6, 7, 8, 9, 10)
SHORT_LINE_CHARS = 30
_MIN_LINE_WORDS = 3
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_ELLIPSES = ("...", "…")
_LINE_ENDS = frozenset(".?!。！？｡．؟۔।॥։።፧፨។៕᠃᠉⁇⁈⁉⸮꘎꘏︒﹒﹖﹗\u061e\u06d4\u0700\u0701\u0702\u104a\u104b\u1362\u1367\u1368")
_MIX = np.int64(-7046029254386353131)

_NGRAM_SCORES = (
    *(f"top_{length}gram_char_share" for length in TOP_NGRAMS),
    *(f"repeated_{length}gram_char_share" for length in REPEATED_NGRAMS),
)
SCORES = (
    "num_words", "mean_word_chars", "symbols_per_word", "ellipses_per_word", "bullet_line_share", "ellipsis_line_share",
    "alphabetic_word_share", "num_stop_words",
    "repeated_paragraph_share", "repeated_paragraph_char_share", "repeated_line_share", "repeated_line_char_share",
    *_NGRAM_SCORES,
    "num_lorem_ipsum_lines", "num_curly_bracket_lines", "num_sentences",
    "line_end_share", "short_line_share", "repeated_char_share", "newlines_per_word",
)  # fmt: skip
"""Names of the columns, in the order of the rules."""


class Score:
    """The document step: every score of a text, which is rejected only where there is no text."""

    schema: Columns = tuple((name, pa.float32()) for name in SCORES)

    def __init__(self) -> None:
        self._words = Words()

    def __call__(self, draft: Draft) -> None:
        if not draft.text.strip():
            draft.rejection = Rejection("no_text")
            return
        draft.columns |= score(draft.text, self._words)


def score(text: str, words: Words) -> dict[str, float]:
    """Give every statistic of a text that is not blank."""
    split = SplitText.of(text, words)
    kept = clean_lines(split)
    return gopher_quality(split) | gopher_repetition(split) | c4(split, kept) | fineweb(split, kept)


@dataclass(frozen=True)
class SplitText:
    """A text, its lines, and its words as numbers."""

    text: str
    lines: list[str]
    """Without the white space around them."""
    num_chunks: list[int]
    """Runs of non-spaces of each line."""
    numbers: Numbers
    """Of each word."""
    chunk_lengths: Numbers
    """Words of each run of non-spaces."""
    facts: npt.NDArray[np.int32]
    """Of each word."""

    @classmethod
    def of(cls, text: str, words: Words) -> SplitText:
        lines = list(map(str.strip, text.splitlines()))
        chunks = list(map(str.split, lines))
        numbers, lengths, facts = words.encode(list(chain.from_iterable(chunks)))
        return cls(text, lines, list(map(len, chunks)), numbers, lengths, facts)

    @cached_property
    def line_ends(self) -> Numbers:
        """Number of words up to the start of the first line, 0, and up to the end of each."""
        return _sum_up(self.chunk_lengths)[_sum_up(np.array(self.num_chunks, dtype=np.int64))]


def _sum_up(values: npt.NDArray[np.signedinteger[Any]]) -> Numbers:
    """Give 0, the first value, the first and the second together, and so on."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def gopher_quality(split: SplitText) -> dict[str, float]:
    text, lines, facts = split.text, split.lines, split.facts
    num_words, num_lines = max(1, len(facts)), max(1, len(lines))
    is_real = (facts & IS_WORD) > 0
    num_real = int(np.count_nonzero(is_real))
    num_bullets = sum([line.startswith(("•", "-")) for line in lines]) if "-" in text or "•" in text else 0
    num_ellipses = text.count("...") + text.count("…")
    return {
        "num_words": num_real,
        "mean_word_chars": int((facts[is_real] >> LENGTH_SHIFT).sum()) / max(1, num_real),
        "symbols_per_word": text.count("#") / num_words,
        "ellipses_per_word": num_ellipses / num_words,
        "bullet_line_share": num_bullets / num_lines,
        "ellipsis_line_share": sum(line.endswith(_ELLIPSES) for line in lines) / num_lines if num_ellipses else 0.0,
        "alphabetic_word_share": int(np.count_nonzero(facts & HAS_LETTER)) / num_words,
        "num_stop_words": (int(np.bitwise_or.reduce(facts)) % (1 << LENGTH_SHIFT) // FIRST_STOP_WORD).bit_count(),
    }


def gopher_repetition(split: SplitText) -> dict[str, float]:
    """Paragraphs have a blank line between them."""
    text = split.text.strip()
    num_chars = max(1, len(split.text))
    paragraphs = [paragraph for part in text.split("\n\n") if (paragraph := part.lstrip("\n"))]
    lines = list(filter(None, text.split("\n")))
    num_paragraphs, paragraph_chars = repeated(paragraphs)
    num_lines, line_chars = repeated(lines)
    shares = {
        "repeated_paragraph_share": num_paragraphs / max(1, len(paragraphs)),
        "repeated_paragraph_char_share": paragraph_chars / num_chars,
        "repeated_line_share": num_lines / max(1, len(lines)),
        "repeated_line_char_share": line_chars / num_chars,
    }
    return shares | {name: chars / num_chars for name, chars in ngram_chars(split.numbers, split.facts >> LENGTH_SHIFT).items()}


def repeated(items: Sequence[str]) -> tuple[int, int]:
    """Give how many items came before, and their characters."""
    if len(set(items)) == len(items):
        return 0, 0
    seen: set[str] = set()
    again = [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]
    return len(again), sum(map(len, again))


def ngram_chars(numbers: Numbers, lengths: npt.NDArray[np.int32]) -> dict[str, int]:
    """Give the characters of the most frequent n-gram, its spaces counted, and those of the n-grams that came before.

    N-grams are compared by a hash of 64 bits, less those that number the words of the text. One that occurs once is the start
    of none that occurs twice, so ever fewer places are looked at.
    """
    ends = _sum_up(lengths)
    out = dict.fromkeys(_NGRAM_SCORES, 0)
    for length in TOP_NGRAMS:
        if length <= len(numbers):  # while each occurs once, the text's first is the most frequent
            out[f"top_{length}gram_char_share"] = int(ends[length]) + length - 1
    places, hashes = np.arange(len(numbers)), numbers
    for length in range(2, min(len(numbers), REPEATED_NGRAMS[-1]) + 1):
        num_inside = int(places.searchsorted(len(numbers) - length, side="right"))
        places = places[:num_inside]
        hashes = _mix(hashes[:num_inside], numbers[places + (length - 1)])
        members, counts = _find_repeated(hashes)
        if not len(members):
            break
        if length in TOP_NGRAMS:
            top, num_top = _find_top(places[members], counts)
            out[f"top_{length}gram_char_share"] = int(ends[top + length] - ends[top] + length - 1) * num_top
        else:
            out[f"repeated_{length}gram_char_share"] = _repeated_chars(places[members], counts, ends, length)
        members.sort()
        places, hashes = places[members], hashes[members]
    return out


def _mix(hashes: Numbers, numbers: Numbers) -> Numbers:
    mixed = (hashes ^ (hashes >> 29)) * _MIX
    mixed += numbers
    return mixed


def _find_repeated(hashes: Numbers) -> tuple[Numbers, Numbers]:
    """Give the places of the hashes that occur twice or more, one group of equal ones behind the other, and their sizes."""
    num_bits = len(hashes).bit_length()
    # One array of hash and place in one number: it sorts faster than an order can be found.
    keys = (hashes << num_bits) | np.arange(len(hashes))
    keys.sort()
    values = keys >> num_bits
    is_same = np.zeros(len(keys) + 1, dtype=bool)
    np.equal(values[1:], values[:-1], out=is_same[1:-1])
    first = np.flatnonzero(is_same[1:] > is_same[:-1])
    last = np.flatnonzero(is_same[1:] < is_same[:-1])
    members = keys[is_same[1:] | is_same[:-1]] & ((1 << num_bits) - 1)
    return members, last - first + 1


def _find_top(places: Numbers, counts: Numbers) -> tuple[int, int]:
    """Give place and number of the most frequent of these groups; of those equally frequent, of the first in the text."""
    num_top = counts.max()
    return int(places[(np.cumsum(counts) - counts)[counts == num_top]].min()), int(num_top)


def _repeated_chars(places: Numbers, counts: Numbers, ends: Numbers, length: int) -> int:
    """Walk over the text; behind an n-gram that came before, go on after its last word, so that what begins inside is not met.

    The n-grams come in groups of equal ones. The first of a group came before the others unless it is not met.
    """
    firsts = np.repeat(places[np.cumsum(counts) - counts], counts)
    is_later = firsts != places
    later = (places[is_later] << 32) | firsts[is_later]
    later.sort()
    places = later >> 32
    chars = ends[places + length] - ends[places]
    is_unmet, inside = bytearray(len(ends)), b"\1" * (length - 1)
    met_later: set[int] = set()
    num_chars = first_free = 0
    for place, first, num in zip(places.tolist(), (later & 0xFFFFFFFF).tolist(), chars.tolist(), strict=True):
        if place < first_free:
            continue
        if is_unmet[first] and first not in met_later:
            met_later.add(first)
            continue
        num_chars += num
        first_free = place + length
        is_unmet[place + 1 : first_free] = inside
    return num_chars


@dataclass(frozen=True)
class KeptLines:
    """What C4's rules for lines leave of a text."""

    lines: list[str]
    places: list[int]
    """Number of each line in the text."""
    has_citations: bool


def clean_lines(split: SplitText) -> KeptLines:
    """Leave out lines of fewer than three words, with a word over 1000 characters, on JavaScript or on cookies and policies."""
    long_enough = [place for place, count in enumerate(split.num_chunks) if count >= _MIN_LINE_WORDS]
    lowered = split.text.lower()
    has_citations = "[" in split.text and _CITATION.search(split.text) is not None
    bad = [phrase for phrase in ("javascript", *_POLICIES) if phrase in lowered]
    if not (has_citations or bad or (len(lowered) > MAX_CHUNK_CHARS and max(map(len, split.lines)) > MAX_CHUNK_CHARS)):
        return KeptLines([split.lines[place] for place in long_enough], long_enough, has_citations)
    places, lines = [], []
    for place in long_enough:
        line = split.lines[place]
        if len(line) > MAX_CHUNK_CHARS and max(map(len, line.split())) > MAX_CHUNK_CHARS:
            continue
        if bad and any(phrase in line.lower() for phrase in bad):
            continue
        places.append(place)
        lines.append(_CITATION.sub("", line) if has_citations else line)
    return KeptLines(lines, places, has_citations)


def c4(split: SplitText, kept: KeptLines) -> dict[str, float]:
    text = split.text
    return {
        "num_lorem_ipsum_lines": sum("lorem ipsum" in line.lower() for line in kept.lines) if "psum" in text.lower() else 0,
        "num_curly_bracket_lines": sum("{" in line for line in kept.lines) if "{" in text else 0,
        "num_sentences": _count_sentences(split, kept),
    }


def _count_sentences(split: SplitText, kept: KeptLines) -> int:
    """Count a sentence for each line, and one more wherever a word follows a mark that ends one."""
    line_of = np.repeat(np.arange(len(split.lines)), np.diff(split.line_ends))
    is_counted = (split.facts & IS_OTHER_MARK) == 0
    if len(kept.lines) < len(split.lines):
        is_kept = np.zeros(len(split.lines), dtype=bool)
        is_kept[kept.places] = True
        is_counted &= is_kept[line_of]
    is_end, line_of = (split.facts[is_counted] & ENDS_SENTENCE) > 0, line_of[is_counted]
    is_start = is_end[:-1] & ~is_end[1:] & (line_of[1:] == line_of[:-1])
    return len(kept.lines) + int(np.count_nonzero(is_start))


def fineweb(split: SplitText, kept: KeptLines) -> dict[str, float]:
    """FineWeb's rules see what C4's leave."""
    lines = [line for line in kept.lines if line.strip()] if kept.has_citations else kept.lines
    num_lines = max(1, len(lines))
    ends = split.line_ends
    num_words = int((ends[1:] - ends[:-1])[kept.places].sum())
    return {
        "line_end_share": sum(line[-1] in _LINE_ENDS for line in lines) / num_lines,
        "short_line_share": sum(len(line) <= SHORT_LINE_CHARS for line in lines) / num_lines,
        "repeated_char_share": repeated(lines)[1] / max(1, sum(map(len, kept.lines))),
        "newlines_per_word": (len(kept.lines) - 1) / max(1, num_words) if kept.lines else 0.0,
    }
