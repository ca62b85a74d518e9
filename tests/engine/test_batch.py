from __future__ import annotations

from collections.abc import Callable

import pytest

from fakes import tiny_tokenizer
from powerhouse.engine import SamplingParams
from powerhouse.engine.batch import ForwardBatch, make_batch
from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.request import Request
from powerhouse.engine.sampler import RowSampling, draw_uniform


def request(prompt: list[int], num_computed: int, blocks: list[int], params: SamplingParams) -> Request:
    made = Request("r", prompt, params, 7, TextStream(tiny_tokenizer()))
    made.num_computed, made.blocks = num_computed, blocks
    return made


def example() -> ForwardBatch:
    """A chunk of 3 in the middle of a prompt, and a decode: blocks of 2 tokens."""
    chunk = request([10, 11, 12, 13, 14, 15], 1, [5, 3, 8], SamplingParams())
    decode = request([20, 21], 1, [4], SamplingParams(temperature=0.5, top_k=9, top_p=0.8))
    decode.token_ids, decode.num_computed, decode.blocks = [20, 21, 22], 2, [4, 1]
    chunk.num_in_flight, decode.num_in_flight = 3, 1
    return make_batch({chunk: 3, decode: 1}, block_size=2)


def test_tokens_lie_flat_with_their_places_in_the_cache() -> None:
    batch = example()
    assert batch.token_ids == (11, 12, 13, 22)
    assert batch.positions == (1, 2, 3, 2)
    assert batch.slots == (5 * 2 + 1, 3 * 2, 3 * 2 + 1, 1 * 2)
    assert batch.query_lengths == (3, 1)
    assert batch.block_tables == ((5, 3), (4, 1)), "only blocks of the context so far"


def test_only_a_request_whose_last_token_is_there_gets_a_new_one() -> None:
    batch = example()
    assert batch.sampled_rows == (3,)
    assert batch.sampling == (RowSampling(0.5, 9, 0.8, draw_uniform(seed=7, num_tokens=1)),)


def ahead() -> ForwardBatch:
    """A decode after a token that row 4 of the second batch before chooses."""
    planned = request([10, 11, 12], 2, [5, 3], SamplingParams())
    planned.num_in_flight = 2  # the prompt's last token, and this one
    return make_batch({planned: 1}, block_size=2, chosen_rows={planned: 4}, num_back=2)


def test_a_token_that_is_not_known_is_told_by_the_batch_that_chooses_it() -> None:
    batch = ahead()
    assert (batch.positions, batch.slots, batch.awaited, batch.num_back) == ((3,), (3 * 2 + 1,), ((0, 4),), 2)
    assert batch.sampling[0].uniform == draw_uniform(seed=7, num_tokens=1), "the one after it is its answer's second"
    assert batch.told([90, 91, 92, 93, 94, 95]).token_ids == (94,)


@pytest.mark.parametrize("make", [example, ahead])
def test_a_batch_survives_the_wire(make: Callable[[], ForwardBatch]) -> None:
    batch = make()
    assert ForwardBatch.from_bytes(batch.to_bytes()) == batch
