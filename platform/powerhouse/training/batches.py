"""From rows of tokens to what a model is given and asked: pure functions of the rows and their places in the stream.

Shapes: B rows, R tokens in a row, T positions, S source positions. Documents of a row are numbered from 0 on, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from powerhouse.corpora.shards import Marks, Rows
from powerhouse.training.noise import IGNORED, Indices, SpanLengths, corrupt_spans, mask_tokens

Arrays = dict[str, Indices]
"""The batch, by the names under which the objectives look for it."""


@dataclass(frozen=True)
class Noise:
    """What gap-filling needs to know; a causal model needs none of it."""

    seed: int
    share: float
    """Share of a row's tokens that are hidden."""
    mean_span: float
    """Mean length of a hidden span of a T5."""
    num_tokens: int
    """Size of the tokenizer's vocabulary."""
    start_id: int
    """What the decoder of a T5 begins with."""
    end_id: int
    """What ends a text."""
    special_tokens: tuple[str, ...]
    """The method's own tokens: the mask, or a sentinel for each span."""
    special_ids: tuple[int, ...]
    """Their ids: the tokenizer's, or those after its vocabulary."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of one step, and what was asked to be known of them."""

    tokens_BR: Rows
    places_B: Indices
    """Their places in the stream."""
    documents_BR: Rows | None = None
    """Numbers of the documents, where attention is to stay within one."""
    learned_BR: Marks | None = None
    """True at tokens that are to be predicted, where not all are."""


def causal_batch(rows: PackedRows, noise: Noise) -> Arrays:
    """Every learned token is predicted from those before it in its row, or in its document: T = R - 1."""
    tokens_BR, documents_BR = rows.tokens_BR.astype(np.int64), rows.documents_BR
    batch = {"inputs": tokens_BR[:, :-1], "labels": tokens_BR[:, 1:]}
    if rows.learned_BR is not None:
        batch["labels"] = np.where(rows.learned_BR[:, 1:], batch["labels"], IGNORED)
    if documents_BR is not None:
        goes_on = documents_BR[:, 1:] == documents_BR[:, :-1]
        batch |= {"labels": np.where(goes_on, batch["labels"], IGNORED), "documents": documents_BR[:, :-1].astype(np.int64)}
    return batch


def masked_batch(rows: PackedRows, noise: Noise) -> Arrays:
    """Hidden tokens are predicted from all of their row, or of their document: T = R."""
    assert rows.learned_BR is None, "refused by the check of the settings"
    inputs_BT, labels_BT = mask_tokens(
        rows.tokens_BR,
        rows.places_B,
        seed=noise.seed,
        share=noise.share,
        mask_id=noise.special_ids[0],
        vocab_size=noise.num_tokens,
    )
    documents = {} if rows.documents_BR is None else {"documents": rows.documents_BR.astype(np.int64)}
    return {"inputs": inputs_BT, "labels": labels_BT, **documents}


def sequence_batch(rows: PackedRows, noise: Noise) -> Arrays:
    """Corrupted spans; or, in rows that tell which tokens are learned, each document's answer from what is before it."""
    return _spans(rows, noise) if rows.learned_BR is None else _pairs(rows, rows.learned_BR, noise)


def _spans(rows: PackedRows, noise: Noise) -> Arrays:
    assert rows.documents_BR is None, "refused by the check of the settings"
    lengths = SpanLengths.of(rows.tokens_BR.shape[1], noise.share, noise.mean_span)
    sources_BS, targets_BT = corrupt_spans(
        rows.tokens_BR, rows.places_B, seed=noise.seed, lengths=lengths, sentinels=noise.special_ids, end_id=noise.end_id
    )
    starts_B1 = np.full((len(targets_BT), 1), noise.start_id)
    return {"sources": sources_BS, "inputs": np.concatenate([starts_B1, targets_BT[:, :-1]], axis=1), "labels": targets_BT}


def _pairs(rows: PackedRows, learned_BR: Marks, noise: Noise) -> Arrays:
    """Sources and targets of a row's documents, each packed for itself and filled up to the longest of the batch.

    A source ends with the end of a text. The decoder is shown the start, and then each token of its target but the last.
    Padding of a row's targets counts as part of its last document, so that there is a source to look at.
    """
    assert rows.documents_BR is not None, "pairs are told apart by their documents"
    sources: list[list[Indices]] = []
    targets: list[list[Indices]] = []
    for tokens_R, documents_R, learned_R in zip(rows.tokens_BR, rows.documents_BR, learned_BR, strict=True):
        here = [documents_R == number for number in np.unique(documents_R[learned_R])]
        first = [int(np.argmax(is_here & learned_R)) for is_here in here]
        before = [is_here & (np.arange(len(tokens_R)) < place) for is_here, place in zip(here, first, strict=True)]
        sources.append([np.append(tokens_R[is_asked], noise.end_id) for is_asked in before])
        targets.append([tokens_R[is_here & learned_R].astype(np.int64) for is_here in here])
    inputs = [[np.append(noise.start_id, target[:-1]) for target in row] for row in targets]
    return {
        "sources": _fill(sources, noise.end_id),
        "source_documents": _number(sources, is_last_prolonged=False),
        "inputs": _fill(inputs, noise.end_id),
        "documents": _number(targets, is_last_prolonged=True),
        "labels": _fill(targets, IGNORED),
    }


def _fill(rows: Sequence[Sequence[Indices]], value: int) -> Indices:
    """Lay each row's parts end to end, and fill up to the longest row."""
    out = np.full((len(rows), max(sum(map(len, row)) for row in rows)), value, dtype=np.int64)
    for out_T, row in zip(out, rows, strict=True):
        joined = np.concatenate([*row, np.empty(0, dtype=np.int64)])
        out_T[: len(joined)] = joined
    return out


def _number(rows: Sequence[Sequence[Indices]], *, is_last_prolonged: bool) -> Indices:
    """The numbers of the parts, 0, 1, ...; padding is of the last one, or of none of them."""
    numbers = [[np.full(len(part), number) for number, part in enumerate(row)] for row in rows]
    if not is_last_prolonged:
        return _fill(numbers, IGNORED)
    out = _fill(numbers, IGNORED)
    last_B1 = np.array([[max(len(row) - 1, 0)] for row in rows])
    return np.where(out == IGNORED, last_B1, out)
