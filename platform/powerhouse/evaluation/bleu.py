"""BLEU (Papineni et al. 2002): sums of an item are lengths, matches and n-grams; smoothing after Chen and Cherry (2014).

All numbers are whole, so that they add in any order to the same bit. Shapes: O orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

import powerhouse
from powerhouse.evaluation.metric import Metric, Pair, count_references
from powerhouse.evaluation.score import Sums, Values, make_signature, total
from powerhouse.evaluation.words import TOKENIZER_VERSION, TokenizerName, ngrams, num_shared, tokenize

Smoothing = Literal["exp", "floor", "add-k", "none"]
_DEFAULT_AMOUNT: dict[Smoothing, float] = {"floor": 0.1, "add-k": 1.0}


class Bleu(Metric):
    """Corpus BLEU from 0 to 100, in sacrebleu's ways and with its signature."""

    metric: Literal["bleu"] = "bleu"
    """Name of the metric."""
    tokenizer: TokenizerName = "13a"
    """How texts become tokens."""
    is_lowercase: bool = False
    """Whether case is ignored."""
    smoothing: Smoothing = "exp"
    """What stands in for an order without a match: halves of halves, `amount`, one added to all counts, or zero."""
    amount: float | None = Field(default=None, gt=0)
    """Of the smoothing: 0.1 for floor and 1 for add-k where it is not set."""
    max_order: int = Field(default=4, ge=1, le=9)
    """Longest n-gram."""
    uses_effective_order: bool = False
    """Whether orders that the text is too short for are left out: for single sentences."""

    def statistic(self, pair: Pair) -> Sequence[float]:
        """Length, closest reference length, matches and n-grams of each order; several references are one of all n-grams."""
        words = self._tokens(pair.hypothesis)
        references = [self._tokens(text) for text in pair.references]
        _, reference_length = min((abs(len(words) - len(tokens)), len(tokens)) for tokens in references)
        hits = [0] * self.max_order
        for order in range(1, self.max_order + 1):
            hits[order - 1] = num_shared(ngrams(words, order), *(ngrams(tokens, order) for tokens in references))
            if not hits[order - 1]:
                break  # nor is a longer one shared
        return [len(words), reference_length, *hits, *(max(len(words) - order, 0) for order in range(self.max_order))]

    def _tokens(self, text: str) -> list[str]:
        return tokenize(text.lower() if self.is_lowercase else text, self.tokenizer)

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        length, reference_length = sums[..., 0], sums[..., 1]
        hits_O, seen_O = np.split(sums[..., 2:], 2, axis=-1)
        precision_O, is_used_O = self._precisions(hits_O, seen_O)
        with np.errstate(divide="ignore"):
            logs_O = np.where(is_used_O, np.log(precision_O), 0)
        geometric = np.exp(logs_O.sum(axis=-1) / np.maximum(is_used_O.sum(axis=-1), 1))
        brevity = np.exp(np.minimum(1 - reference_length / np.maximum(length, 1), 0))
        return {"bleu": np.where(hits_O.any(axis=-1), 100 * brevity * geometric, 0.0)}

    def _precisions(self, hits_O: Values, seen_O: Values) -> tuple[Values, Values]:
        """Smoothed precision of each order, and whether it counts."""
        if self.smoothing == "add-k":
            added_O = np.array([0.0] + [self._amount] * (self.max_order - 1))
            hits_O, seen_O = hits_O + added_O, seen_O + added_O
        can_match_O = np.logical_and.accumulate(seen_O > 0, axis=-1)
        is_empty_O = can_match_O & (hits_O == 0)
        if self.smoothing == "exp":
            hits_O = np.where(is_empty_O, 0.5 ** is_empty_O.cumsum(axis=-1), hits_O)
        elif self.smoothing == "floor":
            hits_O = np.where(is_empty_O, self._amount, hits_O)
        precision_O = np.where(can_match_O, hits_O / np.where(can_match_O, seen_O, 1), 0)
        return precision_O, can_match_O if self.uses_effective_order else np.ones_like(can_match_O)

    @property
    def _amount(self) -> float:
        return _DEFAULT_AMOUNT[self.smoothing] if self.amount is None else self.amount

    def signature(self, sums_NS: Sums) -> str:
        """The one of sacrebleu, to compare with published numbers, behind what it leaves out."""
        has_amount = self.smoothing in _DEFAULT_AMOUNT
        return make_signature(
            metric=self.metric,
            order=self.max_order,
            powerhouse=powerhouse.__version__,
            nrefs=count_references(total(sums_NS)),
            case="lc" if self.is_lowercase else "mixed",
            eff="yes" if self.uses_effective_order else "no",
            tok=self.tokenizer,
            smooth=f"{self.smoothing}[{self._amount:.2f}]" if has_amount else self.smoothing,
            version=TOKENIZER_VERSION,
        )
