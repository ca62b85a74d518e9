from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from answering import run
from fakes import write_tiny_model
from powerhouse.engine import Constraint, Engine, EngineConfig, SamplingParams
from powerhouse.errors import ConfigError, ModelFormatError, QueueFullError, RequestError
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_decoder
from powerhouse.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 21, [250, 3, 99, 4, 17, 2], [42], list(range(40, 71))]
SEEDED = SamplingParams(max_tokens=12, temperature=1.2, top_k=50, top_p=0.95, seed=11, ignore_eos=True)

MakeEngine = Callable[..., Engine]


def test_batched_greedy_is_the_plain_dense_loop(
    make_engine: MakeEngine, greedy_dense: Callable[[Sequence[int], int], tuple[int, ...]]
) -> None:
    completions = list(make_engine().generate(PROMPTS, GREEDY))
    assert [completion.token_ids for completion in completions] == [greedy_dense(prompt, 12) for prompt in PROMPTS]
    assert [completion.num_prompt_tokens for completion in completions] == [len(prompt) for prompt in PROMPTS]


def test_a_seed_gives_the_same_tokens_alone_and_in_company(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = list(engine.generate(PROMPTS[:1], SEEDED))
    company = [(prompt, replace(SEEDED, seed=i, temperature=i / 2)) for i, prompt in enumerate(PROMPTS)]
    assert run(engine, [*company, (PROMPTS[0], SEEDED)])[str(len(company))] == alone[0]
    assert next(engine.generate(PROMPTS[:1], replace(SEEDED, seed=12))) != alone[0]


def test_without_a_seed_every_request_draws_its_own(make_engine: MakeEngine) -> None:
    free = replace(SEEDED, seed=None)
    texts = {completion.token_ids for completion in make_engine().generate([PROMPTS[0]] * 8, free)}
    assert len(texts) == 8, "12 tokens of 300 do not come out alike by chance"


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("tokens", [5, 7, 16])
def test_prompts_in_chunks_give_what_whole_prompts_give(make_engine: MakeEngine, params: SamplingParams, tokens: int) -> None:
    whole = list(make_engine().generate(PROMPTS, params))
    chunked = list(make_engine(max_num_batched_tokens=tokens, max_num_seqs=5).generate(PROMPTS, params))
    assert chunked == whole


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_preempted_request_gives_what_an_undisturbed_one_gives(make_engine: MakeEngine, params: SamplingParams) -> None:
    undisturbed = list(make_engine().generate(PROMPTS, params))
    tight = make_engine(block_size=4, num_blocks=11)
    assert list(tight.generate(PROMPTS, params)) == undisturbed
    assert tight.stats()["num_preemptions"] > 0


def test_an_abort_disturbs_nobody_and_is_told_once(make_engine: MakeEngine) -> None:
    engine = make_engine(num_slots=2)
    requests = [(prompt, GREEDY) for prompt in PROMPTS]
    undisturbed = run(engine, requests)
    disturbed = run(engine, requests, {1: 0, 3: 3})
    assert [disturbed[name].finish_reason for name in "01234"] == ["length", "abort", "length", "abort", "length"]
    assert disturbed["1"].token_ids == ()
    assert all(disturbed[name] == undisturbed[name] for name in "024")


def test_aborting_what_has_ended_or_never_was_does_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.abort("never")
    run(engine, [(PROMPTS[0], GREEDY)])
    engine.abort("0")
    assert not engine.has_unfinished
    assert engine.step() == []


def test_the_text_stops_before_a_stop_string_that_spans_tokens(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    params = replace(GREEDY, max_tokens=60)
    (whole,) = make_engine().generate([PROMPTS[0]], params)
    ends = [len(tokenizer.decode(whole.token_ids[: i + 1])) for i in range(60)]
    place = next(end for end in ends[10:] if "\ufffd" not in whole.text[end - 1 : end + 1])
    stop = whole.text[place - 1 : place + 1]
    (stopped,) = make_engine().generate([PROMPTS[0]], replace(params, stop=(stop,)))
    assert stopped.text == whole.text.partition(stop)[0]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 60


def test_the_end_of_text_token_ends_a_request_unless_it_is_ignored(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    seeds = [
        replace(SEEDED, top_k=None, top_p=1.0, temperature=5.0, max_tokens=100, seed=seed, ignore_eos=False)
        for seed in range(12)
    ]
    requests = [(PROMPTS[0], params) for params in seeds]
    ended = run(make_engine(), requests)
    ignored = run(make_engine(), [(prompt, replace(params, ignore_eos=True)) for prompt, params in requests])
    reasons = Counter(completion.finish_reason for completion in ended.values())
    assert reasons["stop"] >= 1
    for name, completion in ended.items():
        assert ignored[name].token_ids[: len(completion.token_ids)] == completion.token_ids
        assert len(ignored[name].token_ids) == 100
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(tokenizer.end_of_text_id) == len(completion.token_ids) - 1


def test_every_token_comes_with_the_step_that_made_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request(PROMPTS[0], GREEDY, "a")
    outputs = [engine.step() for _ in range(12)]
    assert [len(step) for step in outputs] == [1] * 12
    assert [step[0].num_output_tokens for step in outputs] == list(range(1, 13))
    assert not engine.has_unfinished


def test_more_prompts_than_may_wait_are_fed_in_turn(make_engine: MakeEngine) -> None:
    prompts = [[i + 1] for i in range(30)]
    few = make_engine(max_waiting_requests=2, max_num_seqs=3)
    assert list(few.generate(prompts, GREEDY)) == list(make_engine().generate(prompts, GREEDY))


def test_a_generator_left_early_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(num_slots=2)
    completions = engine.generate(PROMPTS, GREEDY)
    first = next(completions)
    completions.close()  # type: ignore[attr-defined]
    assert not engine.has_unfinished
    assert engine.stats()["kv_cache_usage"] == 0
    assert next(engine.generate(PROMPTS, GREEDY)) == first


def test_n_answers_are_those_of_n_seeds_and_share_the_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    texts = list(engine.generate([PROMPTS[4]], replace(SEEDED, n=4)))
    assert [text.index for text in texts] == [0, 1, 2, 3]
    assert len({text.token_ids for text in texts}) == 4
    (first,) = engine.generate([PROMPTS[4]], SEEDED)
    assert texts[0] == first
    assert engine.stats()["prefix_cache_hits"] >= 3 * 28, "31 tokens are 7 blocks of 4 and a rest"


def test_a_prompt_that_was_answered_is_not_computed_again(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    cold = run(engine, [(PROMPTS[4], GREEDY)])
    assert (engine.stats()["prefix_cache_queries"], engine.stats()["prefix_cache_hits"]) == (31, 0)
    engine.add_request(PROMPTS[4], replace(GREEDY, max_tokens=1))
    assert [output.num_cached_tokens for output in engine.step()] == [28]
    assert (engine.stats()["prefix_cache_queries"], engine.stats()["prefix_cache_hits"]) == (62, 28)
    assert run(engine, [(PROMPTS[4], GREEDY)]) == cold
    assert engine.stats()["kv_cache_usage"] == 0


def test_a_prompt_in_the_cache_is_computed_again_where_it_is_to_be_scored(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    params = replace(GREEDY, prompt_logprobs=0)
    (cold,) = engine.generate([PROMPTS[4]], params)
    (warm,) = engine.generate([PROMPTS[4]], params)
    assert cold == warm
    assert warm.prompt_logprobs is not None
    assert len(warm.prompt_logprobs) == 31


def test_of_those_that_wait_the_smallest_priority_goes_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in {"first": 0, "low": 5, "high": -1, "middle": 0}.items():
        engine.add_request(PROMPTS[0], GREEDY, name, priority)
    ends = []
    while engine.has_unfinished:
        ends += [output.request_id for output in engine.step() if output.is_last]
    assert ends == ["high", "first", "middle", "low"]


def test_no_end_comes_before_the_least_number_of_tokens(make_engine: MakeEngine) -> None:
    (free,) = make_engine().generate([PROMPTS[0]], GREEDY)
    ends = replace(GREEDY, stop_token_ids=tuple(set(free.token_ids)))
    (at_once,) = make_engine().generate([PROMPTS[0]], ends)
    assert (len(at_once.token_ids), at_once.text, at_once.finish_reason) == (1, "", "stop")
    (late,) = make_engine().generate([PROMPTS[0]], replace(ends, min_tokens=5))
    assert not set(late.token_ids[:4]) & set(free.token_ids), "they cannot be chosen yet"
    assert len(late.token_ids) >= 5
    stop = tuple(free.text[:3])
    (whole,) = make_engine().generate([PROMPTS[0]], replace(GREEDY, stop=stop, min_tokens=12))
    assert whole.text[:-1] == free.text[: len(whole.text) - 1]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "message"),
    [
        ("", 1, RequestError, "the prompt is empty\n  allowed: at least one token"),
        ([], 1, RequestError, "the prompt is empty"),
        ([5, 300], 1, RequestError, "a token id is outside the vocabulary\n  got: 300\n  allowed: 0 to 299"),
        ([-1], 1, RequestError, "a token id is outside the vocabulary\n  got: -1"),
        ([1.5], 1, RequestError, "a token id is outside the vocabulary\n  got: 1.5"),
        (
            [1] * 30,
            71,
            RequestError,
            "prompt and answer are longer than the context\n  got: 30 prompt tokens and max_tokens=71\n  allowed: 100 together",
        ),
        (
            [1] * 30,
            20,
            RequestError,
            "the KV cache is too small for this request\n  got: 30 prompt tokens and max_tokens=20\n  allowed: 49 together",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_and_the_others_go_on(
    make_engine: MakeEngine, prompt: str | list[int], max_tokens: int, error: type[Exception], message: str
) -> None:
    engine = make_engine(num_blocks=12, block_size=4, max_model_len=100)
    engine.add_request(PROMPTS[0], GREEDY, "good")
    with pytest.raises(error, match=re.escape(message)):
        engine.add_request(prompt, SamplingParams(max_tokens=max_tokens), "bad")
    while engine.has_unfinished:
        assert {output.request_id for output in engine.step()} == {"good"}


def test_parameters_of_each_prompt_are_as_many_as_the_prompts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    each = [replace(GREEDY, max_tokens=num) for num in (3, 1)]

    assert [len(found.token_ids) for found in engine.generate(PROMPTS[:2], each)] == [3, 1]

    with pytest.raises(RequestError, match="params are of all prompts, or one for each\n  got: 2 for 1 prompts"):
        next(engine.generate(PROMPTS[:1], each))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {300: 1.0}}, "logit_bias: a token id is outside the vocabulary\n  got: 300\n  allowed: 0 to 299"),
        ({"stop_token_ids": (5, -1)}, "stop_token_ids: a token id is outside the vocabulary\n  got: -1"),
        ({"prompt_logprobs_from": 99}, "prompt_logprobs_from is beyond the prompt\n  got: 99\n  allowed: 0 to "),
        ({"n": 6}, "n is more than may be under way\n  got: 6\n  allowed: 1 to 5"),
    ],
)
def test_parameters_that_do_not_suit_the_engine_are_refused(
    make_engine: MakeEngine, params: dict[str, object], message: str
) -> None:
    engine = make_engine(max_num_seqs=2, max_waiting_requests=3)
    with pytest.raises(RequestError, match=re.escape(message)):
        engine.add_request([1], SamplingParams(**params))  # type: ignore[arg-type]
    assert not engine.has_unfinished


def test_the_largest_request_that_fits_is_served(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=12, block_size=4)
    (completion,) = engine.generate([[1] * 30], SamplingParams(max_tokens=19, ignore_eos=True))
    assert len(completion.token_ids) == 19


def test_an_id_in_use_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request(PROMPTS[0], GREEDY, "a")
    with pytest.raises(RequestError, match="the request id is in use\n  got: a"):
        engine.add_request(PROMPTS[0], GREEDY, "a")


def test_a_full_queue_is_refused_and_a_free_seat_is_room(make_engine: MakeEngine) -> None:
    engine = make_engine(max_waiting_requests=2, max_num_seqs=1)
    for _ in range(3):
        engine.add_request(PROMPTS[0], GREEDY)
    with pytest.raises(QueueFullError, match=r"too many requests wait\n  got: 3 under way\n  allowed: 2 waiting"):
        engine.add_request(PROMPTS[0], GREEDY)
    while engine.stats()["num_waiting"] == 2:
        engine.step()
    while engine.stats()["num_waiting"] + engine.stats()["num_running"] == 3:
        engine.step()
    engine.add_request(PROMPTS[0], GREEDY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_stages": 2}, "one process holds one stage\n  got: num_stages=2"),
        ({"max_model_len": 129}, "max_model_len is beyond the model's context\n  got: 129\n  allowed: 1 to 128"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(tmp_path: Path, values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Engine.from_directory(write_tiny_model(tmp_path), EngineConfig.model_validate(values))


def test_dynamic_rope_scaling_is_refused_where_it_would_mix_requests(tmp_path: Path) -> None:
    scaling = {"kind": "dynamic", "factor": 2.0, "original_context": 64}
    directory = write_tiny_model(tmp_path, rope_scaling=scaling)
    with pytest.raises(ConfigError, match="its longest request\n  got: max_model_len=128\n  allowed: 1 to 64"):
        Engine.from_directory(directory)
    Engine.from_directory(directory, EngineConfig(max_model_len=64))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "mistral", "sliding_window": 5},
        {"architecture": "qwen2", "has_qkv_bias": True, "sliding_window": 6, "full_attention_layers": (0, 2)},
        {"architecture": "qwen3", "has_qk_norm": True, "head_dim": 16, "num_key_value_heads": 4},
        {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 16}},
    ],
)
def test_a_decoder_of_any_kind_gives_what_the_plain_loop_gives(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = write_tiny_model(tmp_path, **changes)

    completions = list(
        Engine.from_directory(directory, EngineConfig(max_num_batched_tokens=16, max_num_seqs=8)).generate(PROMPTS, GREEDY)
    )

    expected = generate(load_decoder(directory), PROMPTS, GenerationConfig(max_tokens=12), [])
    assert [list(completion.token_ids) for completion in completions] == expected


def test_a_batch_smaller_than_the_running_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens at least max_num_seqs, not 4 and 8"):
        EngineConfig(max_num_batched_tokens=4, max_num_seqs=8)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="the tokenizer has more tokens than the model\n  got: 300\n  allowed: 299"):
        Engine.from_directory(write_tiny_model(tmp_path, vocab_size=299))


def test_a_directory_generates_what_its_weights_generate(tmp_path: Path, make_engine: MakeEngine) -> None:
    engine = Engine.from_directory(write_tiny_model(tmp_path))
    assert list(engine.generate(PROMPTS, GREEDY)) == list(make_engine().generate(PROMPTS, GREEDY))
    engine.close()


def test_bfloat16_and_text_prompts_are_served(tmp_path: Path) -> None:
    engine = Engine.from_directory(write_tiny_model(tmp_path), EngineConfig(dtype="bfloat16"))
    completions = list(engine.generate(["It was the best", "Call me"], GREEDY))
    assert [len(completion.token_ids) for completion in completions] == [12, 12]


@pytest.mark.parametrize(
    ("num_slots", "settings", "params", "expected"),
    [
        (2, {}, {}, 2),
        (4, {}, {}, 2),
        (1, {}, {}, 0),
        (2, {}, {"presence_penalty": 0.5}, 0),
        (2, {}, {"constraint": Constraint.by_choice(["aaaaaaaa"])}, 0),
        (2, {"speculation": {}}, {}, 0),
    ],
)
def test_a_batch_is_planned_before_its_token_is_known_where_nothing_else_of_it_depends_on_that(
    make_engine: MakeEngine, num_slots: int, settings: dict[str, object], params: dict[str, Any], expected: int
) -> None:
    engine = make_engine(num_slots, **settings)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True, **params))
    for _ in range(2):
        engine.step()
    assert engine.stats()["num_in_flight"] == expected
