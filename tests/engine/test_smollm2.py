"""Real weights: the texts that SmolLM2 is known to write, by every way through the engine that must not change them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from powerhouse.engine import Constraint, Engine, EngineConfig, SamplingParams, SpeculationConfig
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# Greedy in fp32, the same in llama.cpp on the dequantised file, in transformers and in vLLM.
KNOWN = {
    "The capital of France is": " Paris.\n\nThe answer is: 2018-01-22 12:12:53.",
    "Q: What is 12 + 30?\nA:": " 12 + 30 = 42\n\nThe answer is: 42",
}
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(max_tokens=48, temperature=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    yield fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "model")).path
    shutil.rmtree(folder)


def test_smollm2_writes_what_it_is_known_to_by_every_way(directory: Path) -> None:
    speculation = SpeculationConfig(num_tokens=3, ngram=2)
    config = EngineConfig(max_model_len=512, num_blocks=24, max_num_batched_tokens=16, max_num_seqs=8, speculation=speculation)
    engine = Engine.from_directory(directory, config)
    prompts = [*KNOWN, Tokenizer.load(directory).encode_chat(CHAT, add_generation_prompt=True)]
    expected = [*KNOWN.values(), "The capital of France is Paris."]

    for _ in range(2):  # in chunks, side by side, guessed ahead; then out of the prefix cache
        found = list(engine.generate(prompts, GREEDY))
        assert [answer.text for answer in found] == expected
        assert {answer.finish_reason for answer in found} == {"stop"}
    stats = engine.stats()
    assert min(stats["prefix_cache_hits"], stats["num_guessed_right"]) > 0
    assert stats["kv_cache_usage"] == 0

    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    (answer,) = engine.generate(prompts[2:], replace(GREEDY, constraint=Constraint.by_json_schema(schema)))
    assert json.loads(answer.text).keys() == {"city"}
