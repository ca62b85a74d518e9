"""The oracle is one dense pass of the model over prompt and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgpack
import pytest
import torch
from torch import Tensor

from powerhouse.engine import Completion, Engine, SamplingParams, TokenLogprobs
from powerhouse.engine.batch import BatchResult
from powerhouse.engine.logprobs import MAX_NUM_TOP, score
from powerhouse.models.decoder import Decoder

MakeEngine = Callable[..., Engine]

PROMPTS = [[5, 6, 7], [8] * 21, [250, 3, 99, 4, 17, 2], [42]]
ASKED = SamplingParams(
    max_tokens=6, temperature=1.5, top_k=9, top_p=0.9, seed=4, ignore_eos=True, logprobs=3, prompt_logprobs=2
)


@pytest.fixture(scope="module")
def dense_logprobs(decoder: Decoder) -> Callable[[Sequence[int]], Tensor]:
    """[T, V] of the token after each position."""

    def run(token_ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return decoder(torch.tensor([token_ids]), torch.arange(len(token_ids))[None])[0].double().log_softmax(-1)

    return run


def check(found: Sequence[TokenLogprobs | None], token_ids: Sequence[int], logprobs_TV: Tensor, num_top: int) -> None:
    assert len(found) == len(token_ids) == len(logprobs_TV)
    for item, token_id, logprobs_V in zip(found, token_ids, logprobs_TV, strict=True):
        assert item is not None
        assert item.token_id == token_id
        assert item.logprob == pytest.approx(float(logprobs_V[token_id]), abs=1e-4)
        assert [value for _, value in item.top] == pytest.approx(logprobs_V.topk(num_top).values.tolist(), abs=1e-4)
        assert [value for _, value in item.top] == pytest.approx([float(logprobs_V[i]) for i, _ in item.top], abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 5, "max_num_seqs": 5}, {"block_size": 4, "num_blocks": 8}, {"num_slots": 3}],
    ids=["whole", "in chunks", "pre-empted", "in flight"],
)
def test_logprobs_are_those_of_the_models_own_distribution(
    make_engine: MakeEngine, dense_logprobs: Callable[[Sequence[int]], Tensor], settings: dict[str, int]
) -> None:
    for prompt, completion in zip(PROMPTS, make_engine(**settings).generate(PROMPTS, ASKED), strict=True):
        logprobs_TV = dense_logprobs([*prompt, *completion.token_ids])
        assert completion.logprobs is not None
        assert completion.prompt_logprobs is not None
        assert completion.prompt_logprobs[0] is None, "nothing comes before the first token"
        check(completion.prompt_logprobs[1:], prompt[1:], logprobs_TV[: len(prompt) - 1], 2)
        check(completion.logprobs, completion.token_ids, logprobs_TV[len(prompt) - 1 : -1], 3)


def test_a_prompt_can_be_scored_without_an_answer(
    make_engine: MakeEngine, dense_logprobs: Callable[[Sequence[int]], Tensor]
) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    completions = list(engine.generate(PROMPTS, SamplingParams(max_tokens=0, prompt_logprobs=1)))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.prompt_logprobs is not None
        check(completion.prompt_logprobs[1:], prompt[1:], dense_logprobs(prompt)[:-1], 1)
        assert completion == Completion("", (), "length", len(prompt), None, completion.prompt_logprobs)
    assert engine.stats()["kv_cache_usage"] == 0


def test_logprobs_change_no_token_and_none_is_told_unasked(make_engine: MakeEngine) -> None:
    silent = SamplingParams(max_tokens=6, temperature=1.5, top_k=9, top_p=0.9, seed=4, ignore_eos=True)
    engine = make_engine()
    engine.add_request(PROMPTS[0], silent, "silent")
    engine.add_request(PROMPTS[0], ASKED, "asked")
    tokens: dict[str, list[int]] = {"silent": [], "asked": []}
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            assert (output.logprobs is None) == (output.request_id == "silent")
            assert (output.prompt_logprobs is None) == (output.request_id == "silent" or output.num_output_tokens > 1)
    assert tokens["silent"] == tokens["asked"]


def test_rivals_are_told_likeliest_first_and_the_token_is_always_told() -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    first, second, third = score(logits_SV, [0, 2, 1], [2, 0, MAX_NUM_TOP])
    assert [token_id for token_id, _ in first.top] == [1, 2]
    assert first.logprob == pytest.approx(1 - torch.tensor([1.0, 3, 2]).logsumexp(0).item(), abs=1e-6)
    assert second.top == ()
    assert [token_id for token_id, _ in third.top] == [2, 1, 0], "no more than there are"


def test_a_result_survives_the_wire() -> None:
    told = TokenLogprobs(3, -0.25, ((4, -0.125), (3, -0.25)))
    result = BatchResult([1, 3], [None, told], [told])
    assert BatchResult.from_wire(msgpack.unpackb(msgpack.packb(result))) == result
