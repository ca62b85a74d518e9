"""Metrics of tasks with a known answer: accuracy, exact match and F1 of labels, exact match and F1 of short answers."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from powerhouse.errors import InputError
from powerhouse.evaluation.metric import Metric, Pair
from powerhouse.evaluation.score import CONFIDENCE, Score, Sums, Values, make_signature

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Share(Metric):
    """A metric by which an item is right or wrong."""

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        return {str(self.facts()["metric"]): sums[..., 0] / num_items}

    def score(self, sums_NS: Sums, seed: int = 0) -> dict[str, Score]:
        """Wilson's interval, which has a width also where all items are right; that of resamples for items asked repeatedly."""
        scores = super().score(sums_NS, seed)
        if (sums_NS[:, 0] > 1).any():
            return scores
        signature = make_signature(interval=f"wilson,{CONFIDENCE}")
        return {
            name: Score(
                value=score.value,
                interval=wilson_interval(score.value, score.n),
                n=score.n,
                signature=f"{self.signature(sums_NS)}|{signature}",
            )
            for name, score in scores.items()
        }


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Of a share of n independent items (Wilson 1927; Newcombe 1998, method 3)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((centre + side) / (1 + z**2 / n) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


class Accuracy(_Share):
    """Share of items whose label is the reference, or one of several."""

    metric: Literal["accuracy"] = "accuracy"
    """Name of the metric."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        return (pair.hypothesis in pair.references,)


class ExactMatch(_Share):
    """Share of items whose answer is a reference, word for word."""

    metric: Literal["exact_match"] = "exact_match"
    """Name of the metric."""
    normalise: Literal["squad", "none"] = "squad"
    """squad: in lower case, without punctuation and articles, single spaces (Rajpurkar et al. 2016); none: as it is."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        texts = (pair.hypothesis, *pair.references)
        answer, *references = map(normalise_answer, texts) if self.normalise == "squad" else texts
        return (answer in references,)


class AnswerF1(Metric):
    """Mean over items of the F1 of the words that answer and reference share, the best of several references."""

    metric: Literal["answer_f1"] = "answer_f1"
    """Name of the metric."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        words = normalise_answer(pair.hypothesis).split()
        return (max(_word_f1(words, normalise_answer(text).split()) for text in pair.references),)

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        return {"answer_f1": sums[..., 0] / num_items}


class LabelF1(Metric):
    """F1 of each label; their mean (macro) and that of all decisions together (micro).

    A label that is neither predicted nor right anywhere has F1 0. A hypothesis that is no label (a model may say anything)
    counts against the label that was right, and as a decision for none.
    """

    metric: Literal["label_f1"] = "label_f1"
    """Name of the metric."""
    labels: tuple[str, ...] = Field(min_length=2)
    """All labels of the task."""

    @field_validator("labels")
    @classmethod
    def _are_different(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) < len(labels):
            raise ValueError("labels that differ from each other")
        return labels

    def statistic(self, pair: Pair) -> Sequence[float]:
        """True positives, false positives and false negatives of each label.

        Raises:
            InputError: the reference is not one known label.
        """
        if len(pair.references) != 1 or pair.references[0] not in self.labels:
            raise InputError("unknown label", got=repr(pair.references), allowed=f"one of {', '.join(self.labels)}")
        right, said = pair.references[0], pair.hypothesis
        true_positives = [label == right == said for label in self.labels]
        false_positives = [label == said != right for label in self.labels]
        return [*true_positives, *false_positives, *[label == right != said for label in self.labels]]

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        hits, false_positives, misses = np.split(sums, 3, axis=-1)
        wrong = false_positives + misses
        each = _f1(hits, wrong)
        means = {"f1_macro": each.mean(axis=-1), "f1_micro": _f1(hits.sum(axis=-1), wrong.sum(axis=-1))}
        return means | {f"f1_{label}": each[..., number] for number, label in enumerate(self.labels)}


def _f1(hits: Values, wrong: Values) -> Values:
    """2PR / (P + R) = 2 tp / (2 tp + fp + fn)."""
    found: Values = 2 * hits / np.maximum(2 * hits + wrong, 1)
    return found


def normalise_answer(text: str) -> str:
    """As the evaluation script of SQuAD does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    num_shared = (Counter(words) & Counter(reference)).total()
    return 2 * num_shared / (len(words) + len(reference))
