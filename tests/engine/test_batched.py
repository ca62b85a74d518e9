from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fakes import TEXTS, tiny_tokenizer, write_tiny_model
from families import ENCODER, T5_SHAPE, build, export
from powerhouse.engine import EngineConfig, SamplingParams
from powerhouse.engine.batched import AnsweringModel, TextEncoder
from powerhouse.errors import ConfigError, RequestError
from powerhouse.models.encoder import EncoderConfig, pool
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_model

ROWS = [[5, 6, 7], [9] * 12, [1], [30, 2, 44, 17, 8], [3, 1, 2], list(range(20, 40))]
FEW = EngineConfig(device="cpu", max_num_seqs=3, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export(build(EncoderConfig, ENCODER | {"vocab_size": 300}), tmp_path_factory.mktemp("encoder"))
    tiny_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export(build(T5Config, T5_SHAPE | {"vocab_size": 300}), tmp_path_factory.mktemp("t5"))
    tiny_tokenizer().save(folder)
    return folder


def test_a_texts_vector_is_the_one_that_it_has_alone(encoder: Path) -> None:
    model = load_model(encoder)
    vectors_NC = TextEncoder(encoder, FEW).embed([*ROWS, TEXTS[0][:12]])
    rows = [*ROWS, tiny_tokenizer().encode(TEXTS[0][:12])]
    for vector_C, row in zip(vectors_NC, rows, strict=True):
        with torch.inference_mode():
            alone_1C = pool(model.encode(torch.tensor([row])), torch.ones(1, len(row), dtype=torch.bool), "mean")  # type: ignore[operator]
        torch.testing.assert_close(vector_C, torch.nn.functional.normalize(alone_1C)[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(vectors_NC.norm(dim=-1), torch.ones(7))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_encoder_decoders_answer_is_the_one_that_it_gives_alone(t5: Path, temperature: float) -> None:
    model = load_model(t5)
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=4, top_k=20)
    found = list(AnsweringModel(t5, FEW).generate(ROWS, params))
    config = GenerationConfig(max_tokens=9, temperature=temperature, seed=4, top_k=20)
    for completion, row in zip(found, ROWS, strict=True):
        expected = generate(model, [row], config, [model.config.end_token_id])[0]  # type: ignore[arg-type]
        assert list(completion.token_ids) == expected
        assert completion.text == tiny_tokenizer().decode(expected)
        assert completion.finish_reason == ("stop" if len(expected) < 9 else "length")
        assert completion.num_prompt_tokens == len(row)


def test_what_cannot_be_answered_is_refused(encoder: Path, t5: Path, tmp_path: Path) -> None:
    for prompts, message in [
        ([[1], []], "prompt 1 is empty"),
        ([[300]], "prompt 0: a token id is outside the vocabulary\n  got: 300\n  allowed: 0 to 299"),
        ([[1] * 33], "prompt 0 is too long\n  got: 33 tokens\n  allowed: 32"),
    ]:
        with pytest.raises(RequestError, match=re.escape(message)):
            TextEncoder(encoder, FEW).embed(prompts)
    with pytest.raises(RequestError, match=r"min_p has no effect on an encoder-decoder\n  got: 0\.5"):
        list(AnsweringModel(t5, FEW).generate([[1]], SamplingParams(min_p=0.5)))
    decoder = write_tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="not an encoder-decoder\n  got: Decoder\n  do: give a decoder to Engine"):
        AnsweringModel(decoder)
    with pytest.raises(ConfigError, match="texts are made vectors by an encoder\n  got: T5"):
        TextEncoder(t5)
