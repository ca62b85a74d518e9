"""Bits per byte and perplexities of texts, of the nats that a model gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from powerhouse.errors import InputError
from powerhouse.evaluation.metric import Metric, Pair
from powerhouse.evaluation.score import Sums, Values
from powerhouse.heldout import bits_per_byte


class Likelihood(Metric):
    """Of (nats, bytes, words, tokens) of each text; a word is what stands between blanks, as in lm-evaluation-harness."""

    metric: Literal["likelihood"] = "likelihood"
    """Name of the metric."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        raise InputError("a likelihood is of a text that a model reads", do="use it in a task of kind read")

    def rows(self, texts: Sequence[str], nats: Sequence[float], num_tokens: Sequence[int]) -> Sums:
        """Rows [N, 3 + S] of texts, each its own only reference."""
        num_bytes = [len(text.encode()) for text in texts]
        num_words = [max(len(text.split()), 1) for text in texts]
        ones = np.ones((len(texts), 3))
        return np.column_stack([ones, nats, num_bytes, num_words, num_tokens]).astype(np.float64)

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        nats, num_bytes, num_words, num_tokens = np.moveaxis(sums, -1, 0)
        return {
            "bits_per_byte": bits_per_byte(nats, num_bytes),
            "byte_perplexity": np.exp(nats / num_bytes),
            "word_perplexity": np.exp(nats / num_words),
            "token_perplexity": np.exp(nats / num_tokens),
        }
