"""Documents that hold a piece of an evaluation set are left out: 13 words in a row of one of its items.

Source: Brown et al. 2020 (arXiv 2005.14165), appendix C: 13-grams of lower-case words without punctuation.
Shapes: W words of a text, G n-grams of all items. Words are numbers of the sets' own vocabulary, 0 for all others, so the
n-grams of a document cost one look-up a word and thirteen passes over an array; a hash that is equal is then compared word
by word.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from powerhouse.config import Config, StoragePath
from powerhouse.corpora.document import Columns, Draft, Outcome, Rejection
from powerhouse.corpora.view import DocumentView
from powerhouse.errors import InputError

NUM_WORDS = 13
REASON = "contaminated"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_NUM_NAMED = 20

U64 = npt.NDArray[np.uint64]


class EvaluationSetConfig(Config):
    """One set of test items that no document may hold a piece of."""

    name: str
    """Name in the report."""
    path: StoragePath
    """A .jsonl file, an item to a line, or a .txt file, an item to a paragraph."""
    fields: list[str] = Field(default=[])
    """Names of the fields of a .jsonl item that are text; with none, every string in it, lists and objects included."""


@dataclass(frozen=True)
class Item:
    """One item of an evaluation set; the words of each text of it."""

    set_name: str
    number: int
    texts: list[list[str]]

    @property
    def has_ngram(self) -> bool:
        return any(len(words) >= NUM_WORDS for words in self.texts)


def read_items(sets: Sequence[EvaluationSetConfig]) -> list[Item]:
    """Read all items, numbered from 1 in each set.

    Raises:
        InputError: a file is missing or damaged, lacks a field, or has no item of 13 words.
    """
    items = [item for config in sets for item in _read_set(config)]
    for config in sets:
        if not any(item.has_ngram for item in items if item.set_name == config.name):
            what = f"evaluation set {config.name}: no item has {NUM_WORDS} words in a row, so nothing can be found of it"
            raise InputError(what, got=config.path, do="name its text fields, or leave the set out")
    return items


def digests(sets: Sequence[EvaluationSetConfig]) -> dict[str, str]:
    """Give the hash of each set's file.

    Raises:
        InputError: a file is missing.
    """
    return {f"evaluation:{config.name}": hashlib.sha256(_read_bytes(config)).hexdigest() for config in sets}


def _read_bytes(config: EvaluationSetConfig) -> bytes:
    try:
        return config.path.read_bytes()
    except OSError as error:
        raise InputError(f"evaluation set {config.name}: cannot be read", got=error, do="correct the path") from None


def _read_set(config: EvaluationSetConfig) -> Iterator[Item]:
    try:
        lines = _read_bytes(config).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{config.path}: not UTF-8", got=error, do="save the set as UTF-8") from None
    if config.path.suffix == ".txt":
        paragraphs = [" ".join(group) for is_text, group in groupby(lines, lambda line: bool(line.strip())) if is_text]
        parts = [[text] for text in paragraphs]
    elif config.path.suffix == ".jsonl":
        parts = [_texts_of_line(config, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        raise InputError(f"evaluation set {config.name}: unknown ending", got=config.path.name, allowed=".jsonl, .txt")
    for number, texts in enumerate(parts, start=1):
        yield Item(config.name, number, [DocumentView(text).normalised_words for text in texts])


def _texts_of_line(config: EvaluationSetConfig, number: int, line: str) -> list[str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{config.path}: line {number} is not JSON", got=error, do="mend or delete the line") from None
    if not config.fields:
        return list(_strings(record))
    if not isinstance(record, dict) or (missing := [name for name in config.fields if name not in record]):
        there = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{config.path}: line {number} lacks {missing}", got=there, do="correct `fields`")
    return [text for name in config.fields for text in _strings(record[name])]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class Ngrams:
    """All 13-grams of some items, to be found in documents."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._texts = [(number, words) for number, item in enumerate(items) for words in item.texts]
        words = sorted({word for _, text in self._texts for word in text})
        self._ids = {word: place for place, word in enumerate(words, start=1)}
        hashes = [self._hash(text) for _, text in self._texts]
        places = [(text, start) for text, found in enumerate(hashes) for start in range(len(found))]
        joined_G = np.concatenate([*hashes, np.empty(0, dtype=np.uint64)])
        order = np.argsort(joined_G, kind="stable")
        self._hashes_G: U64 = joined_G[order]
        self._places_G = np.array(places, dtype=np.int64).reshape(-1, 2)[order]

    def _hash(self, words: Sequence[str]) -> U64:
        """Hash the 13 words from each place on, [W - 12]."""
        ids_W = np.array([self._ids.get(word, 0) for word in words], dtype=np.uint64)
        hashes = np.zeros(max(0, len(words) - NUM_WORDS + 1), dtype=np.uint64)
        for offset in range(NUM_WORDS if len(hashes) else 0):
            hashes = (hashes + ids_W[offset : offset + len(hashes)]) * _MULTIPLIER
            hashes ^= hashes >> np.uint64(31)
        return hashes

    def find(self, words: Sequence[str]) -> list[tuple[int, int]]:
        """Give the numbers of the items that share 13 words with a document, each with the first such place in it."""
        hashes = self._hash(words)
        first = np.searchsorted(self._hashes_G, hashes, side="left")
        last = np.searchsorted(self._hashes_G, hashes, side="right")
        found: dict[int, int] = {}
        for start in np.flatnonzero(first < last).tolist():
            for text, place in self._places_G[first[start] : last[start]].tolist():
                item, theirs = self._texts[text]
                if theirs[place : place + NUM_WORDS] == list(words[start : start + NUM_WORDS]):
                    found.setdefault(item, start)
        return sorted(found.items())


class Decontaminate:
    """The document step: a document that holds a piece of an item is left out, and tells of which."""

    schema: Columns = (("evaluation_items", pa.list_(pa.int32())),)

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._ngrams = Ngrams(items)

    def __call__(self, draft: Draft) -> None:
        words = draft.view.normalised_words
        found = self._ngrams.find(words)
        draft.columns["evaluation_items"] = [number for number, _ in found]
        if found:
            number, start = found[0]
            item = self._items[number]
            piece = " ".join(words[start : start + NUM_WORDS])
            draft.rejection = Rejection(REASON, f"{item.set_name} item {item.number}: {piece}")


class ReportContamination:
    """The corpus step: which items of each set were found, and in how many documents."""

    name = "contamination"

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __call__(self, index: pa.Table) -> Outcome:
        hits = [numbers for numbers in index["evaluation_items"].to_pylist() if numbers]
        return Outcome(
            report={name: self._describe(name, hits) for name in dict.fromkeys(item.set_name for item in self._items)}
        )

    def _describe(self, name: str, hits: list[list[int]]) -> dict[str, Any]:
        of_set = {number for number, item in enumerate(self._items) if item.set_name == name}
        counts = Counter(number for numbers in hits for number in numbers if number in of_set)
        return {
            "items": len(of_set),
            "items too short to be found": sum(not self._items[number].has_ngram for number in of_set),
            "items found": len(counts),
            "documents left out": sum(not of_set.isdisjoint(numbers) for numbers in hits),
            "most found": {f"item {self._items[number].number}": count for number, count in counts.most_common(_NUM_NAMED)},
        }
