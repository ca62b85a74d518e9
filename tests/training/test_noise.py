from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from powerhouse.training.noise import IGNORED, SpanLengths, corrupt_spans, mask_tokens

MASK, VOCAB, END = 900, 800, 799


def rows(num_rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (num_rows, length)).astype(np.int32)


def test_a_hidden_token_is_masked_replaced_or_left_in_berts_shares() -> None:
    rows_BR, places = rows(400, 128), np.arange(400)

    inputs, labels = mask_tokens(rows_BR, places, seed=1, share=0.25, mask_id=MASK, vocab_size=VOCAB)

    is_hidden = labels != IGNORED
    assert (is_hidden.sum(axis=1) == 32).all()
    np.testing.assert_array_equal(labels[is_hidden], rows_BR[is_hidden])
    np.testing.assert_array_equal(inputs[~is_hidden], rows_BR[~is_hidden])
    shares = [(inputs[is_hidden] == MASK).mean(), (inputs[is_hidden] == labels[is_hidden]).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1 + 0.1 / VOCAB], atol=0.015)


def fill_gaps(source: list[int], target: list[int], first: int, num_spans: int) -> list[int]:
    """What was there before: each sentinel of the source replaced by what follows it in the target."""
    bounds = [target.index(first + i) for i in range(num_spans)] + [len(target) - 1]
    spans = {first + i: target[bounds[i] + 1 : bounds[i + 1]] for i in range(num_spans)}
    assert all(spans.values()), "no span is empty"
    return [token for part in source for token in (spans.get(part) or [part])]


@given(st.integers(2, 60), st.floats(0.05, 0.9), st.floats(1.0, 8.0), st.integers(0, 2**30))
def test_a_source_with_its_gaps_filled_is_the_row(length: int, share: float, mean_span: float, seed: int) -> None:
    lengths, rows_BR = SpanLengths.of(length, share, mean_span), rows(3, length, seed)

    sentinels = range(MASK, MASK + lengths.num_spans)

    sources, targets = corrupt_spans(rows_BR, np.array([0, 5, 9]), seed=seed, lengths=lengths, sentinels=sentinels, end_id=END)

    assert sources.shape == (3, length - lengths.num_hidden + lengths.num_spans)
    assert targets.shape == (3, lengths.num_hidden + lengths.num_spans + 1)
    assert (targets[:, -1] == END).all()
    for row, source, target in zip(rows_BR.tolist(), sources.tolist(), targets.tolist(), strict=True):
        assert fill_gaps(source, target, MASK, lengths.num_spans) == row


def test_the_lengths_are_those_that_t5_was_trained_with() -> None:
    """512 tokens in, 15% hidden in spans of 3: 77 tokens in 26 spans (mesh-tensorflow's random_spans_helper)."""
    assert SpanLengths.of(512, 0.15, 3.0) == SpanLengths(num_hidden=77, num_spans=26)


def test_noise_depends_on_the_place_alone_and_not_on_the_rows_around_it() -> None:
    rows_BR, places, lengths = rows(8, 40), np.arange(30, 38), SpanLengths.of(40, 0.3, 2.0)
    settings = {"seed": 3, "lengths": lengths, "sentinels": range(MASK, MASK + lengths.num_spans), "end_id": END}
    masks = {"seed": 3, "share": 0.15, "mask_id": MASK, "vocab_size": VOCAB}

    whole, whole_masked = corrupt_spans(rows_BR, places, **settings), mask_tokens(rows_BR, places, **masks)

    for i in range(8):
        part = slice(i, i + 1)
        for one, all_rows in zip(corrupt_spans(rows_BR[part], places[part], **settings), whole, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[i])
        for one, all_rows in zip(mask_tokens(rows_BR[part], places[part], **masks), whole_masked, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[i])
    other = mask_tokens(rows_BR, places + 8, **masks)
    assert (other[0] != whole_masked[0]).any(), "the next epoch hides other tokens"
