"""What BLEU, ROUGE and METEOR do with words: tokens, stems, n-grams and longest common subsequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import chain
from typing import Literal, TypeVar

import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_intl import TokenizerV14International
from sacrebleu.tokenizers.tokenizer_none import NoneTokenizer
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

TokenizerName = Literal["13a", "intl", "char", "zh", "none"]
"""sacrebleu's: mteval-v13a (the default of WMT), mteval-v14 for any script, characters, Chinese, and white space alone."""
Gram = TypeVar("Gram", str, tuple[str, ...])

TOKENIZER_VERSION = sacrebleu.__version__
STEMMER_VERSION = f"porter,nltk-{version('nltk')}"

_TOKENIZERS: dict[TokenizerName, Callable[[], Callable[[str], str]]] = {
    "13a": Tokenizer13a,
    "intl": TokenizerV14International,
    "char": TokenizerChar,
    "zh": TokenizerZh,
    "none": NoneTokenizer,
}


@cache
def _tokenizer(name: TokenizerName) -> Callable[[str], str]:
    return _TOKENIZERS[name]()


def tokenize(text: str, name: TokenizerName) -> list[str]:
    return _tokenizer(name)(text.rstrip()).split()


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # two seconds, all of nltk: only where words are stemmed

    found: Callable[[str], str] = PorterStemmer().stem
    return found


@lru_cache(maxsize=2**18)
def stem(word: str) -> str:
    """Porter 1980 with nltk's extensions, as rouge-score and nltk's METEOR have it."""
    return _stemmer()(word)


def ngrams(tokens: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def num_shared(grams: Sequence[Gram], *others: Sequence[Gram]) -> int:
    """Of the n-grams of both, each as often as in the one that has fewer of it; of several others, the one with the most."""
    kinds = set(grams)
    shared = kinds.intersection(*others) if len(others) == 1 else kinds.intersection(chain.from_iterable(others))
    if len(kinds) == len(grams):
        return len(shared)  # counting costs three times as much, and few sentences repeat a phrase
    counts, wanted = Counter(grams), [Counter(other) for other in others]
    return sum(min(counts[gram], max(other[gram] for other in wanted)) for gram in shared)


def common_rows(rows: Sequence[str], columns: Sequence[str]) -> list[int]:
    """The table of longest common subsequences, a row in the bits of one number (Hyyro 2004).

    Bit j of row i is set where column j adds to the subsequence: the first j bits of it hold as many ones as the longest
    common subsequence of the first i + 1 rows and the first j columns is long.
    """
    places: dict[str, int] = {}
    for number, token in enumerate(columns):
        places[token] = places.get(token, 0) | 1 << number
    everything = (1 << len(columns)) - 1
    free, table = everything, []
    for token in rows:
        matches = free & places.get(token, 0)
        free = (free + matches | free - matches) & everything
        table.append(everything ^ free)
    return table


def common_length(rows: Sequence[str], columns: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    return common_rows(rows, columns)[-1].bit_count() if rows else 0


def common_places(rows: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Places in `rows` of one longest common subsequence; where there are several, of the one that rouge-score takes."""
    table = [0, *common_rows(rows, columns)]
    row, column, found = len(rows), len(columns), []
    while row and column:
        if rows[row - 1] == columns[column - 1]:
            row, column = row - 1, column - 1
            found.append(row)
        elif _length(table[row], column - 1) > _length(table[row - 1], column):
            column -= 1
        else:
            row -= 1
    return found[::-1]


def _length(row: int, num_columns: int) -> int:
    return (row & (1 << num_columns) - 1).bit_count()
