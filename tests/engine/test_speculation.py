"""The yardstick is the same engine without speculation, and the model's own distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fakes import TEXTS, tiny_decoder, tiny_tokenizer, write_tiny_model
from powerhouse.engine import Engine, EngineConfig, LocalRunner, SamplingParams
from powerhouse.engine.sampler import RowSampling, distribution
from powerhouse.engine.settings import SpeculationConfig
from powerhouse.engine.speculation import DraftModel
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.decoder import Decoder
from powerhouse.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [8] * 21, [250, 3, 99, 4, 17, 2], [42], [1, 2, 3, 4] * 6]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=20, temperature=1.1, top_k=3, seed=3, repetition_penalty=1.02, presence_penalty=0.1, n=2)


def drafted(decoder: Decoder, draft: Decoder, num_tokens: int = 3, num_slots: int = 1, **more: object) -> Engine:
    config = EngineConfig.model_validate(more)
    runner = LocalRunner(Stage(decoder, config))
    runner.num_slots = num_slots
    speculator = DraftModel(Stage(draft, config), num_tokens, config.block_size)
    return Engine(decoder.config, tiny_tokenizer(), config, runner, speculator)


@pytest.fixture(scope="module")
def near(decoder: Decoder) -> Decoder:
    """A draft model that often agrees: the model, a little disturbed."""
    model = tiny_decoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


TIGHT = {"block_size": 4, "num_blocks": 14, "max_num_batched_tokens": 9, "max_num_seqs": 4}


@pytest.mark.parametrize(
    ("params", "tight"),
    [
        (replace(GREEDY, max_tokens=12), TIGHT),
        pytest.param(replace(SAMPLED, max_tokens=12), TIGHT, marks=pytest.mark.slow),
        pytest.param(SAMPLED, {"num_slots": 3}, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_without_speculation_token_for_token(
    make_engine: MakeEngine, decoder: Decoder, near: Decoder, params: SamplingParams, tight: dict[str, int]
) -> None:
    plain = list(make_engine().generate(PROMPTS, params))
    looking_up = make_engine(**tight, speculation={"ngram": 1})
    guessing = drafted(decoder, near, **tight)
    for engine in (looking_up, guessing):
        assert list(engine.generate(PROMPTS, params)) == plain
        assert list(engine.generate(PROMPTS, params)) == plain, "nor from the prefix cache"
        stats = engine.stats()
        assert stats["kv_cache_usage"] == 0
        assert 0 < stats["num_guessed_right"] < stats["num_guessed"]


@pytest.mark.slow
@settings(max_examples=4)
@given(st.integers(1, 6), st.sampled_from([1, 3, 8]), st.sampled_from([40, 80]), st.integers(1, 3), st.integers(0, 99))
def test_a_model_that_drafts_for_itself_is_always_right(
    decoder: Decoder, num_tokens: int, block_size: int, num_blocks: int, num_slots: int, seed: int
) -> None:
    engine = drafted(decoder, decoder, num_tokens, num_slots, block_size=block_size, num_blocks=num_blocks)
    list(engine.generate(PROMPTS, replace(SAMPLED, seed=seed, max_tokens=9)))
    assert engine.stats()["num_guessed"] == engine.stats()["num_guessed_right"] > 0


def test_a_step_gives_all_tokens_that_were_guessed_right_with_their_logprobs(decoder: Decoder) -> None:
    engine = drafted(decoder, decoder, num_tokens=3)
    engine.add_request(PROMPTS[0], replace(GREEDY, max_tokens=10, logprobs=0))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [len(output.token_ids) for output in outputs] == [1, 4, 4, 1]
    for output in outputs:
        assert output.logprobs is not None
        assert [told.token_id for told in output.logprobs] == list(output.token_ids)


@pytest.mark.slow
def test_answers_are_distributed_as_the_model_says(decoder: Decoder, near: Decoder) -> None:
    """All answers of three tokens out of the two likeliest each time: counts beside the exact probabilities."""
    params = SamplingParams(max_tokens=3, temperature=2.0, top_k=2, seed=5, n=128, ignore_eos=True)
    engine = drafted(decoder, near, max_num_seqs=128, num_blocks=600)
    prompts = [[9, 4]] * 6
    found = Counter(
        completion.token_ids
        for i, prompt in enumerate(prompts)
        for completion in engine.generate([prompt], replace(params, seed=i))
    )
    exact = {ids: probability(decoder, prompts[0], ids) for ids in answers(decoder, prompts[0])}
    assert sum(exact.values()) == pytest.approx(1)
    assert found.keys() <= exact.keys()
    num_answers = sum(found.values())
    assert chisquare([found[ids] for ids in exact], [share * num_answers for share in exact.values()]).pvalue > 0.01
    assert engine.stats()["num_guessed_right"] < engine.stats()["num_guessed"]


def answers(decoder: Decoder, prompt: Sequence[int]) -> list[tuple[int, ...]]:
    texts: list[tuple[int, ...]] = [()]
    for _ in range(3):
        texts = [
            (*text, int(token)) for text in texts for token in next_probabilities(decoder, [*prompt, *text]).nonzero()[:, 0]
        ]
    return texts


def probability(decoder: Decoder, prompt: Sequence[int], ids: tuple[int, ...]) -> float:
    result = 1.0
    for i, token_id in enumerate(ids):
        result *= float(next_probabilities(decoder, [*prompt, *ids[:i]])[token_id])
    return result


def next_probabilities(decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_V = decoder(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1]
    return distribution(logits_V[None], [RowSampling(2.0, 2, 1.0, 0.0)])[0]


def test_a_draft_model_comes_from_its_directory_and_must_suit_the_model(tmp_path: Path) -> None:
    model, draft = write_tiny_model(tmp_path / "model"), write_tiny_model(tmp_path / "draft", num_hidden_layers=1)
    short = write_tiny_model(tmp_path / "short", max_position_embeddings=64)
    plain = Engine.from_directory(model)
    engine = Engine.from_directory(model, EngineConfig(speculation=SpeculationConfig(model=draft)))
    assert list(engine.generate(PROMPTS, GREEDY)) == list(plain.generate(PROMPTS, GREEDY))
    assert engine.stats()["num_guessed"] > 0
    with pytest.raises(ConfigError, match=r"speculation\.model has a shorter context\n  got: 64\n  do: set max_model_len=64"):
        Engine.from_directory(model, EngineConfig(speculation=SpeculationConfig(model=short)))
    Tokenizer.train(TEXTS * 3, 290).save(short)
    with pytest.raises(ConfigError, match=r"speculation\.model has another vocabulary"):
        Engine.from_directory(model, EngineConfig(speculation=SpeculationConfig(model=short)))
