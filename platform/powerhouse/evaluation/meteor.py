"""METEOR (Banerjee and Lavie 2005; parameters of Lavie and Agarwal 2007): words aligned by form, stem and meaning, less for
every break in their order. Mean over items; the greedy alignment is nltk's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from powerhouse.config import StoragePath
from powerhouse.evaluation.metric import Metric, Pair
from powerhouse.evaluation.score import Sums, Values
from powerhouse.evaluation.wordnet import WordNet, find_wordnet, load_wordnet
from powerhouse.evaluation.words import STEMMER_VERSION, TOKENIZER_VERSION, TokenizerName, stem, tokenize

Places = dict[int, str]
"""Words that are not aligned yet, by their place in the text."""
Forms = Callable[[str], Iterable[str]]
"""What a word of the hypothesis may match."""


class Meteor(Metric):
    """The score of each item is its best over the references; an empty hypothesis has 0."""

    metric: Literal["meteor"] = "meteor"
    """Name of the metric."""
    tokenizer: TokenizerName = "13a"
    """How texts become tokens; case is ignored."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of recall in the mean of precision and recall."""
    beta: float = Field(default=3.0, gt=0)
    """How steeply the penalty for broken order grows."""
    gamma: float = Field(default=0.5, ge=0, le=1)
    """The highest penalty."""
    has_synonyms: bool = True
    """Whether words of one meaning match too."""
    wordnet: StoragePath | None = None
    """Folder with WordNet's index.* and data.* files; looked for in the usual places where it is not set."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        """The item's score.

        Raises:
            InputError: WordNet is wanted and not installed.
        """
        said, *references = ([word.lower() for word in tokenize(text, self.tokenizer)] for text in _texts(pair))
        return (max(self._score(said, words) for words in references),)

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        return {"meteor": sums[..., 0] / num_items}

    def facts(self) -> dict[str, Any]:
        network = self._network()
        return {
            "metric": self.metric,
            "alpha": self.alpha,
            "beta": self.beta,
            "gamma": self.gamma,
            "case": "lc",
            "tok": f"{self.tokenizer},sacrebleu-{TOKENIZER_VERSION}",
            "stems": STEMMER_VERSION,
            "synonyms": f"wordnet,{network.digest}" if network else "none",
        }

    def _network(self) -> WordNet | None:
        return _open(self.wordnet) if self.has_synonyms else None

    def _score(self, said: list[str], wanted: list[str]) -> float:
        matches = align(said, wanted, self._network())
        if not matches:
            return 0.0
        precision, recall = len(matches) / len(said), len(matches) / len(wanted)
        mean = precision * recall / (self.alpha * precision + (1 - self.alpha) * recall)
        penalty: float = self.gamma * (_num_chunks(matches) / len(matches)) ** self.beta
        return (1 - penalty) * mean


def _texts(pair: Pair) -> tuple[str, ...]:
    return (pair.hypothesis, *pair.references)


@cache
def _open(folder: Path | None) -> WordNet:
    return load_wordnet(find_wordnet(folder))


def align(said: Sequence[str], wanted: Sequence[str], network: WordNet | None) -> list[tuple[int, int]]:
    """Pairs of places, first of equal words, then of what is left of equal stems, then of synonyms of one another."""
    left, right = dict(enumerate(said)), dict(enumerate(wanted))
    matches = _match(left, right, lambda word: (word,))
    for places in (left, right):  # nltk, the reference here, looks up the stems in WordNet, not the words
        places.update({place: stem(word) for place, word in places.items()})
    matches += _match(left, right, lambda word: (word,))
    if network:
        matches += _match(left, right, network.synonyms)
    return sorted(matches)


def _match(left: Places, right: Places, forms: Forms) -> list[tuple[int, int]]:
    """From the end, each word takes the last free one that it may match; both are then no longer free."""
    free = defaultdict(list)
    for place, word in right.items():
        free[word].append(place)
    matches = []
    for place, word in reversed(list(left.items())):
        if found := [free[form] for form in forms(word) if free.get(form)]:
            other = max(found, key=lambda places: places[-1]).pop()
            matches.append((place, other))
            del left[place], right[other]
    return matches


def _num_chunks(matches: list[tuple[int, int]]) -> int:
    """Runs of matches that are neighbours in both texts."""
    return 1 + sum((other[0] - one[0], other[1] - one[1]) != (1, 1) for one, other in pairwise(matches))
