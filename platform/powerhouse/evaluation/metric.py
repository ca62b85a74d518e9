"""The one shape of a metric: `statistic(item)` -> a row of sums, merge by item, finalise to a Score.

A metric is a Config, so that a task file declares it; its settings are its signature. All that depends on an item is in its
row, whichever process computed it; rows merge by the items' numbers, so that any split among any number of workers gives the
same rows in the same order, and from them the same scores to the bit.

Shapes: N items, S sums of an item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import powerhouse
from powerhouse.config import Config
from powerhouse.errors import InputError
from powerhouse.evaluation.score import Score, Sums, Values, as_score, make_signature, resample, total

_NUM_COMMON = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """An item: what a system said, and what it should have said."""

    hypothesis: str
    references: tuple[str, ...]


def make_pairs(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[Pair]:
    """One pair an item. An item has one reference or several; a hypothesis may be empty, a reference may not.

    Raises:
        InputError: there is no item, not as many references as hypotheses, or an item without a usable reference.
    """
    if len(hypotheses) != len(references):
        got = f"{len(hypotheses)} hypotheses, {len(references)} items with references"
        raise InputError("hypotheses and references do not match", got=got, allowed="one entry of each for every item")
    if not hypotheses:
        raise InputError("no item to score", allowed="at least one")
    lists = [(item,) if isinstance(item, str) else tuple(item) for item in references]
    pairs = [Pair(hypothesis, item) for hypothesis, item in zip(hypotheses, lists, strict=True)]
    for number, pair in enumerate(pairs):
        _check(number, pair)
    return pairs


def _check(number: int, pair: Pair) -> None:
    if not isinstance(pair.hypothesis, str):
        raise InputError(f"item {number}: the hypothesis is no text", got=repr(pair.hypothesis), allowed="a string")
    if not pair.references:
        raise InputError(f"item {number}: no reference", allowed="at least one", do="leave the item out of the data")
    for text in pair.references:
        if not isinstance(text, str) or not text.strip():
            do = "leave the item out of the data, or correct it"
            raise InputError(f"item {number}: an empty reference", got=repr(text), allowed="a string with text", do=do)


class Metric(Config, ABC):
    """What is measured; a subclass adds a field `metric` with its name, and says how in further fields."""

    @abstractmethod
    def statistic(self, pair: Pair) -> Sequence[float]:
        """The sums of one item, always as many, in the metric's own order."""

    @abstractmethod
    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        """Values [...] by name from the number of items [...] and their sums [..., S]."""

    def prepare(self, pairs: Sequence[Pair]) -> Self:
        """The metric with what it must know of all items before any is scored; most need nothing."""
        return self

    def facts(self) -> dict[str, Any]:
        """What the signature says: every setting, unless the metric has a better way to say it."""
        values = self.model_dump(mode="json").items()
        return {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in values}

    def statistics(self, pairs: Sequence[Pair]) -> Sums:
        """Rows [N, 3 + S]: 1, number of references, its square, and the item's sums."""
        own = self.own_statistics(pairs)
        num_references = np.array([len(pair.references) for pair in pairs], dtype=np.float64)
        return np.column_stack([np.ones(len(pairs)), num_references, num_references**2, own])

    def own_statistics(self, pairs: Sequence[Pair]) -> Sums:
        """Rows [N, S]. A metric that works on many items at once overrides this one."""
        return np.array([self.statistic(pair) for pair in pairs], dtype=np.float64)

    def values(self, sums: Sums) -> dict[str, Values]:
        """Values [...] by name from sums [..., 3 + S] of rows."""
        return dict(self.finalise(sums[..., 0], sums[..., _NUM_COMMON:]))

    def signature(self, sums_NS: Sums) -> str:
        """Two results may be compared where this is the same."""
        return make_signature(**self.facts(), refs=count_references(total(sums_NS)), version=powerhouse.__version__)

    def score(self, sums_NS: Sums, seed: int = 0) -> dict[str, Score]:
        """Scores by name from the rows of all items.

        Raises:
            InputError: there is no item.
        """
        values, signature = self.values(total(sums_NS)), self.signature(sums_NS)
        resampled = self.values(resample(sums_NS, seed)) if len(sums_NS) > 1 else {}
        return {name: as_score(float(v), resampled.get(name), len(sums_NS), signature) for name, v in values.items()}


def count_references(sums_S: Sums) -> str:
    """How many each item has, or `var`, from the sums of rows."""
    num_items, num_references, squares = sums_S[:_NUM_COMMON]
    is_constant = num_items * squares == num_references**2  # Cauchy-Schwarz, in whole numbers
    return str(int(num_references / num_items)) if is_constant else "var"


@dataclass(frozen=True)
class Part:
    """Rows of some items of a data set, from one process."""

    numbers_N: npt.NDArray[np.int64]
    """Numbers of the items in the data set."""
    sums_NS: Sums


def merge(parts: Iterable[Part]) -> Part:
    """All rows, in the items' order: the same for any split and any order of the parts.

    Raises:
        InputError: an item is in two parts.
    """
    found = [part for part in parts if len(part.numbers_N)]
    if not found:
        raise InputError("no item to score", allowed="at least one")
    numbers_N = np.concatenate([part.numbers_N for part in found])
    order_N = np.argsort(numbers_N, kind="stable")
    numbers_N = numbers_N[order_N]
    if len(twice := numbers_N[1:][numbers_N[1:] == numbers_N[:-1]]):
        raise InputError("an item was scored twice", got=f"item {twice[0]}", allowed="each item in one part")
    return Part(numbers_N, np.concatenate([part.sums_NS for part in found])[order_N])
