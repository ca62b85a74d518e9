"""What is hidden from a model that learns to fill gaps: pure functions of the rows, the seed and their places in the stream.

Shapes: B rows, R tokens in a row, S corrupted tokens, T target tokens. A row's noise is drawn from (seed, place), so it does
not depend on the number of workers or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerhouse.corpora.shards import Rows

Indices = npt.NDArray[np.int64]
IGNORED = -100
"""The label that is not counted."""

_STAYS_MASKED, _BECOMES_RANDOM = 0.8, 0.9


def mask_tokens(
    rows_BR: Rows, places_B: Indices, *, seed: int, share: float, mask_id: int, vocab_size: int
) -> tuple[Indices, Indices]:
    """Give inputs and labels, [B, R] each: BERT's masking (Devlin et al. 2019, section 3.1).

    `share` of a row's tokens are to be predicted; of these 80% are replaced by the mask, 10% by any token, 10% stay.
    """
    inputs_BR = rows_BR.astype(np.int64)
    labels_BR = np.full_like(inputs_BR, IGNORED)
    num_hidden = max(1, round(share * rows_BR.shape[1]))
    for inputs_R, labels_R, place in zip(inputs_BR, labels_BR, places_B.tolist(), strict=True):
        random = np.random.default_rng([seed, place])
        hidden = random.permutation(len(inputs_R))[:num_hidden]
        labels_R[hidden] = inputs_R[hidden]
        fate = random.random(num_hidden)
        others = random.integers(0, vocab_size, num_hidden)
        kept = np.where(fate < _BECOMES_RANDOM, others, inputs_R[hidden])
        inputs_R[hidden] = np.where(fate < _STAYS_MASKED, mask_id, kept)
    return inputs_BR, labels_BR


@dataclass(frozen=True)
class SpanLengths:
    """How much of a row of R tokens is hidden, the same for every row, so that a batch needs no padding."""

    num_hidden: int
    num_spans: int

    @classmethod
    def of(cls, row_length: int, share: float, mean_span: float) -> SpanLengths:
        num_hidden = min(max(1, round(share * row_length)), row_length - 1)
        num_spans = min(max(1, round(num_hidden / mean_span)), num_hidden, row_length - num_hidden)
        return cls(num_hidden, num_spans)


def corrupt_spans(
    rows_BR: Rows, places_B: Indices, *, seed: int, lengths: SpanLengths, sentinels: Sequence[int], end_id: int
) -> tuple[Indices, Indices]:
    """Give inputs_BS and targets_BT: T5's span corruption (Raffel et al. 2020, section 3.1.4).

    A hidden span is one sentinel in the inputs, of which there are as many as spans; the targets are each sentinel with
    its span, then `end_id`.
    """
    sources, targets = [], []
    for row_R, place in zip(rows_BR.astype(np.int64), places_B.tolist(), strict=True):
        random = np.random.default_rng([seed, place])
        shown = _parts(random, len(row_R) - lengths.num_hidden, lengths.num_spans)
        hidden = _parts(random, lengths.num_hidden, lengths.num_spans)
        pieces = np.split(row_R, np.cumsum(np.stack([shown, hidden], axis=1).ravel())[:-1])
        marks = [np.array([sentinel]) for sentinel in sentinels]
        sources.append(np.concatenate([part for pair in zip(pieces[::2], marks, strict=True) for part in pair]))
        gaps = [part for pair in zip(marks, pieces[1::2], strict=True) for part in pair]
        targets.append(np.concatenate([*gaps, [end_id]]))
    return np.stack(sources), np.stack(targets)


def _parts(random: np.random.Generator, total: int, num_parts: int) -> Indices:
    """Cut `total` into parts of at least one, all ways alike."""
    cuts = np.sort(random.permutation(total - 1)[: num_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
