"""ROUGE-N, ROUGE-L and ROUGE-Lsum (Lin 2004): mean over items of precision, recall and F1, as ROUGE-1.5.5 and rouge-score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from pydantic import Field

from powerhouse.evaluation.metric import Metric, Pair
from powerhouse.evaluation.score import Sums, Values
from powerhouse.evaluation.words import STEMMER_VERSION, common_length, common_places, ngrams, num_shared, stem

Kind = Literal["rouge1", "rouge2", "rouge3", "rouge4", "rougeL", "rougeLsum"]
_WORD = re.compile("[a-z0-9]+")


class Rouge(Metric):
    """Overlap with the reference; with several, each kind takes the one with the best F1."""

    metric: Literal["rouge"] = "rouge"
    """Name of the metric."""
    kinds: tuple[Kind, ...] = Field(default=("rouge1", "rouge2", "rougeL", "rougeLsum"), min_length=1)
    """Which overlaps: n-grams, longest common subsequence, or its union over sentences (one on each line)."""
    is_stemmed: bool = True
    """Whether words of more than three letters are reduced to their stems (Porter), as `ROUGE-1.5.5.pl -m` does."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        """Precision, recall and F1 of each kind."""
        said = self._lines(pair.hypothesis)
        found = [self._against(said, self._lines(text)) for text in pair.references]
        best = (max((scores[number] for scores in found), key=lambda score: score[2]) for number in range(len(self.kinds)))
        return [value for score in best for value in score]

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        names = [f"{kind}{part}" for kind in self.kinds for part in ("_precision", "_recall", "")]
        return {name: sums[..., number] / num_items for number, name in enumerate(names)}

    def facts(self) -> dict[str, Any]:
        stems = STEMMER_VERSION if self.is_stemmed else "none"
        return {"metric": self.metric, "kinds": ",".join(self.kinds), "stems": stems, "sentences": "lines", "best": "f1"}

    def _lines(self, text: str) -> list[list[str]]:
        """Words of each line, those without a word left out too: they match nothing."""
        lines = (_WORD.findall(line) for line in text.lower().split("\n"))
        if not self.is_stemmed:
            return [words for words in lines if words]
        return [[stem(word) if len(word) > 3 else word for word in words] for words in lines if words]

    def _against(self, said: list[list[str]], wanted: list[list[str]]) -> list[tuple[float, float, float]]:
        words, reference = list(chain.from_iterable(said)), list(chain.from_iterable(wanted))
        if not words or not reference:
            return [(0.0, 0.0, 0.0)] * len(self.kinds)
        return [self._overlap(kind, said, wanted, words, reference) for kind in self.kinds]

    def _overlap(
        self, kind: Kind, said: list[list[str]], wanted: list[list[str]], words: list[str], reference: list[str]
    ) -> tuple[float, float, float]:
        if kind == "rougeLsum":
            return _scores(_union_hits(said, wanted, words, reference), len(words), len(reference))
        if kind == "rougeL":
            return _scores(common_length(reference, words), len(words), len(reference))
        order = int(kind[5:])
        hits = num_shared(ngrams(words, order), ngrams(reference, order))
        return _scores(hits, len(words) - order + 1, len(reference) - order + 1)


def _scores(num_hits: int, num_said: int, num_wanted: int) -> tuple[float, float, float]:
    if not num_hits:
        return 0.0, 0.0, 0.0
    precision, recall = num_hits / num_said, num_hits / num_wanted
    return precision, recall, 2 * precision * recall / (precision + recall)


def _union_hits(said: list[list[str]], wanted: list[list[str]], words: list[str], reference: list[str]) -> int:
    """Words of the reference in a subsequence with any sentence (Lin 2004, section 3.2), none more often than it was said."""
    if len(said) == len(wanted) == 1:
        return common_length(reference, words)
    left, num_hits = Counter(words), 0
    for sentence in wanted:
        for place in set().union(*(common_places(sentence, other) for other in said)):
            if left[sentence[place]]:
                left[sentence[place]] -= 1
                num_hits += 1
    return num_hits
