"""Texts without meaning and with every trap of a text metric: punctuation, case, entities, digits, stems, emptiness, lines."""

from __future__ import annotations

import random

from powerhouse.evaluation.metric import Pair

_COMMON = (
    "the a cat cats dogs running runs ran sat car automobile big large went goes nation national relational ponies caresses"
)
_ODD = "mat, on. of-it 3.5 10,000 U.S. &amp; &quot; Über naïve happily happiness 国际 it's (so) - 1,2. $5"
WORDS = [*_COMMON.split(), *_ODD.split()]


def random_pairs(num_pairs: int, *, max_lines: int = 1, seed: int = 0) -> list[Pair]:
    """Hypotheses of no to 13 words a line; one to three references, of which some share much with the hypothesis."""
    generator = random.Random(seed)

    def text(low: int) -> str:
        lines = range(generator.randint(1, max_lines))
        return "\n".join(" ".join(generator.choices(WORDS, k=generator.randint(low, 13))) for _ in lines)

    def like(other: str) -> str:
        lines = [
            " ".join(generator.choice([word, word, generator.choice(WORDS)]) for word in line.split())
            for line in other.split("\n")
        ]
        return "\n".join(lines) if other.strip() else text(1)

    def pair() -> Pair:
        hypothesis = text(0)
        references = (
            generator.choice([lambda: text(1), lambda: like(hypothesis)])() for _ in range(generator.choice([1, 1, 2, 3]))
        )
        return Pair(hypothesis, tuple(references))

    return [pair() for _ in range(num_pairs)]
