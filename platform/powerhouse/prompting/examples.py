"""Examples before a question: which of the known items, and in which order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from math import factorial
from typing import Any, Literal, NamedTuple

import numpy as np

from powerhouse.errors import InputError

Choice = Literal["seeded", "balanced", "nearest"]


class Example(NamedTuple):
    """An item with its true label, and the text by which `nearest` measures."""

    item: Mapping[str, Any]
    label: str
    text: str = ""


def choose_examples(pool: Sequence[Example], num: int, how: Choice, seed: int, question: str = "") -> list[Example]:
    """Draw `num` of the pool: at random; with as many of each label as can be; or the most alike, the likest last.

    Balanced draws go around the labels, which take turns in a random order. Nearness is the cosine of the counts of words,
    weighted by how rare a word is in the pool; what is equally near comes in the pool's order. A draw depends on the pool,
    the seed and the question alone.

    Raises:
        InputError: the pool is too small, or a label has too few.
    """
    if num > len(pool):
        raise InputError("more examples than there are", got=num, allowed=f"0 to {len(pool)}")
    if how == "nearest":
        return _nearest(pool, num, question)
    order = [pool[index] for index in np.random.default_rng(seed).permutation(len(pool))]
    return order[:num] if how == "seeded" else _balanced(order, num)


def _balanced(order: Sequence[Example], num: int) -> list[Example]:
    by_label: dict[str, list[Example]] = {}
    for example in order:
        by_label.setdefault(example.label, []).append(example)
    num_rounds = -(-num // len(by_label))
    chosen = [examples[turn] for turn in range(num_rounds) for examples in by_label.values() if turn < len(examples)][:num]
    if len(chosen) < num:
        counts = {label: len(examples) for label, examples in by_label.items()}
        raise InputError("a label has too few examples to balance", got=counts, do="give more of it, or choose 'seeded'")
    return chosen


def _nearest(pool: Sequence[Example], num: int, question: str) -> list[Example]:
    bags = [Counter(_words(example.text)) for example in pool]
    num_with = Counter(word for bag in bags for word in bag)
    rarity = {word: np.log((1 + len(pool)) / (1 + count)) + 1 for word, count in num_with.items()}

    def weigh(bag: Counter[str]) -> dict[str, float]:
        weights = {word: count * rarity.get(word, 0.0) for word, count in bag.items()}
        norm = np.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {word: weight / norm for word, weight in weights.items()}

    asked = weigh(Counter(_words(question)))
    alike = [sum(weight * asked.get(word, 0.0) for word, weight in weigh(bag).items()) for bag in bags]
    best = sorted(range(len(pool)), key=lambda index: (-alike[index], index))[:num]
    return [pool[index] for index in reversed(best)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def orders_of(examples: Sequence[Example], num_orders: int, seed: int) -> list[list[Example]]:
    """Give different orders of the examples: the given one, then others drawn with the seed.

    Raises:
        InputError: there are not so many.
    """
    num_all = factorial(len(examples))
    if num_orders > num_all:
        raise InputError(f"{len(examples)} examples have fewer orders", got=num_orders, allowed=f"1 to {num_all}")
    first = tuple(range(len(examples)))
    if num_all <= 120:
        others = [order for order in permutations(first) if order != first]
        drawn = [others[index] for index in np.random.default_rng(seed).permutation(len(others))]
    else:
        drawn = _draw_orders(len(examples), num_orders, seed)
    return [[examples[index] for index in order] for order in [first, *drawn][:num_orders]]


def _draw_orders(num: int, num_orders: int, seed: int) -> list[tuple[int, ...]]:
    generator, first = np.random.default_rng(seed), tuple(range(num))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < num_orders - 1:
        order = tuple(int(index) for index in generator.permutation(num))
        if order != first:
            drawn[order] = None
    return list(drawn)
