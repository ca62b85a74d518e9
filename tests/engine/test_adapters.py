"""The yardstick is the plain loop over a model with that one adapter put into it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from answering import run
from fakes import write_tiny_adapter, write_tiny_model
from powerhouse.engine import Engine, EngineConfig, SamplingParams
from powerhouse.engine.settings import SpeculationConfig
from powerhouse.errors import ConfigError, ModelFormatError, RequestError
from powerhouse.models.adapters import AdapterConfig, LoRAConfig, PromptConfig
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_model

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
CONFIGS: dict[str, AdapterConfig] = {
    "formal": LoRAConfig(rank=3, alpha=5),
    "short": PromptConfig(num_tokens=4),
    "rude": LoRAConfig(rank=2, alpha=4, targets=("k_proj", "o_proj", "up_proj", "layers.1.mlp.down_proj")),
    "long": PromptConfig(num_tokens=7),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and four adapters of which no tensor is zero."""
    folder = tmp_path_factory.mktemp("adapted")
    write_tiny_model(folder / "base")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        write_tiny_adapter(folder / name, folder / "base", config, seed)
    return folder


def settings(folder: Path, **more: object) -> EngineConfig:
    return EngineConfig.model_validate({"adapters": {name: folder / name for name in CONFIGS}, "block_size": 4} | more)


def plain(folder: Path, name: str | None) -> tuple[int, ...]:
    model = load_model(folder / "base", adapter=folder / name if name else None)
    return tuple(generate(model, [PROMPT], GenerationConfig(max_tokens=8), [])[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 6, "num_blocks": 20}])
def test_each_of_a_batch_is_answered_with_its_own_adapter(folder: Path, more: dict[str, int]) -> None:
    engine = Engine.from_directory(folder / "base", settings(folder, **more))
    names = [None, *CONFIGS]
    expected = {name: plain(folder, name) for name in names}
    assert len(set(expected.values())) == len(names), "the adapters change the answer"
    for _ in range(2):  # the second time out of the prefix cache, which holds each adapter's own
        for name in names:
            engine.add_request(PROMPT, GREEDY, str(name), adapter=name)
        found: dict[str, list[int]] = {str(name): [] for name in names}
        while engine.has_unfinished:
            for output in engine.step():
                found[output.request_id] += output.token_ids
                assert output.num_prompt_tokens == len(PROMPT), "a soft prompt is not the user's"
        assert {name: tuple(found[str(name)]) for name in names} == expected
    assert engine.stats()["prefix_cache_hits"] > 0
    assert engine.stats()["kv_cache_usage"] == 0


def test_a_prompt_is_scored_and_penalised_without_its_soft_prompt(folder: Path) -> None:
    engine = Engine.from_directory(folder / "base", settings(folder))
    engine.add_request(PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=1, repetition_penalty=1.3), adapter="long")
    (first, _) = [output for _ in range(2) for output in engine.step()]
    told = first.prompt_logprobs
    assert told is not None
    assert [item and item.token_id for item in told] == PROMPT
    model = load_model(folder / "base", adapter=folder / "long")
    ids = torch.tensor([[*range(300, 307), *PROMPT]])
    with torch.inference_mode():
        logprobs_TV = model(ids, torch.arange(ids.shape[1])[None])[0].log_softmax(-1)
    expected = [float(logprobs_TV[6 + i, token_id]) for i, token_id in enumerate(PROMPT)]
    assert [item and item.logprob for item in told] == pytest.approx(expected, abs=1e-4)


def test_adapters_that_nobody_asks_for_change_nothing(folder: Path) -> None:
    bare, adapted = (Engine.from_directory(folder / "base", config) for config in (EngineConfig(), settings(folder)))
    assert run(adapted, [(PROMPT, GREEDY)]) == run(bare, [(PROMPT, GREEDY)])


def test_an_adapter_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = Engine.from_directory(folder / "base", settings(folder))
    with pytest.raises(RequestError, match="no such adapter\n  got: nice\n  allowed: formal, short, rude, long"):
        engine.add_request(PROMPT, GREEDY, adapter="nice")
    with pytest.raises(RequestError, match=re.escape("longer than the context\n  got: 127 prompt tokens")):
        engine.add_request([1] * 120, GREEDY, adapter="long")
    assert not engine.has_unfinished
    with pytest.raises(ModelFormatError, match=r"adapter_config\.json: missing"):
        Engine.from_directory(folder / "base", EngineConfig(adapters={"none": tmp_path}))
    with pytest.raises(ConfigError, match=r"speculation\.model cannot read soft prompts"):
        Engine.from_directory(folder / "base", settings(folder, speculation=SpeculationConfig(model=folder / "base")))
