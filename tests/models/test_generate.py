from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fakes import tiny_decoder
from families import CLASSIC, CLASSICS, T5_SHAPE, T5S, build, export
from powerhouse.errors import RequestError
from powerhouse.models.classic import ClassicConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.generate import GenerationConfig, choose, generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41], [9] * 12, [33, 8, 21, 54]]
STOP = [7, 11, 19, 23, 31, 43]


def seq2seq(kind: str) -> Any:
    same = {"num_encoder_layers": 3}  # with fewer than decoder layers, transformers' own cache is too short
    return (
        build(T5Config, T5_SHAPE | T5S[kind] | same) if kind in T5S else build(ClassicConfig, CLASSIC | CLASSICS[kind] | same)
    )


def trimmed(ids: list[int], start: int, stop: Sequence[int] = STOP) -> list[int]:
    """Their continuation without what we leave out: the start, the stop token and padding."""
    new = ids[start:]
    return list(itertools.takewhile(lambda token: token not in stop, new))


@pytest.mark.parametrize("changes", [{}, {"architecture": "mistral", "sliding_window": 4}, {"num_key_value_heads": 4}])
def test_a_batch_of_prompts_is_continued_as_transformers_continues_each(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_decoder(seed=3, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(model, tmp_path))

    ours = generate(model, PROMPTS, GenerationConfig(max_tokens=20), STOP)

    for prompt, answer in zip(PROMPTS, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )
        assert answer == trimmed(expected[0].tolist(), len(prompt))


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (3, 2.0)])
@pytest.mark.parametrize("kind", [*T5S, *CLASSICS])
def test_an_encoder_decoder_searches_as_transformers_does(
    tmp_path: Path, kind: str, num_beams: int, length_penalty: float
) -> None:
    model = seq2seq(kind)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(export(model, tmp_path))
    settings = GenerationConfig(max_tokens=12, num_beams=num_beams, length_penalty=length_penalty)

    likely = generate(model, PROMPTS, GenerationConfig(max_tokens=12), [])
    stop = sorted({row[3] for row in likely})  # what surely comes, so that searches do stop

    ours = generate(model, PROMPTS, settings, stop)

    for prompt, answer in zip(PROMPTS, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, num_beams=num_beams, length_penalty=length_penalty, do_sample=False,
            eos_token_id=stop, pad_token_id=0, decoder_start_token_id=model.config.start_token_id, forced_eos_token_id=None,
        )  # fmt: skip
        assert answer == trimmed(expected[0].tolist(), 1, stop)
    if length_penalty < 2 and num_beams < 4:
        assert any(len(answer) < 12 for answer in ours), "some search must stop, or the rule is not tested"


def test_a_row_sampled_in_a_batch_is_the_row_sampled_alone() -> None:
    model, settings = tiny_decoder(), GenerationConfig(max_tokens=10, temperature=0.9, top_k=50, top_p=0.9, seed=4)

    batch = generate(model, PROMPTS, settings, STOP)

    assert batch == [generate(model, [prompt], settings, STOP)[0] for prompt in PROMPTS]
    assert batch != generate(model, PROMPTS, GenerationConfig(max_tokens=10), STOP)


def test_sampling_follows_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0])
    settings = GenerationConfig(temperature=0.7, top_k=4, top_p=0.9)
    generator = torch.Generator().manual_seed(0)
    probabilities = (logits / 0.7).softmax(-1)
    kept = {4: probabilities[4], 0: probabilities[0]}  # 0.75 + 0.18 of the four likeliest: over 0.9 with two of them

    counts = Counter(choose(logits, settings, generator) for _ in range(4000))

    assert set(counts) == set(kept)
    assert counts[4] / 4000 == pytest.approx(float(kept[4] / (kept[4] + kept[0])), abs=0.03)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 300]], {}, r"ids outside the vocabulary\n  got: \[300\]\n  allowed: 0 to 299"),
        ([[1] * 100], {"max_tokens": 29}, r"too long\n  got: 100 tokens and 29 new\n  allowed: 128 in all"),
        ([[1]], {"num_beams": 2, "temperature": 1.0}, "beams do not sample"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts: list[list[int]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generate(tiny_decoder(), prompts, GenerationConfig(**changes), STOP)
