from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fakes import tiny_decoder
from powerhouse.engine import Engine, EngineConfig, LocalRunner, SamplingParams, attention, compiled
from powerhouse.engine.attention import PagedAttention, PagedCache
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.compiled import CompiledDecodes, DecodeAttention, attends
from powerhouse.engine.formats import make_pack
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.decoder import Decoder
from powerhouse.tokenizer import Tokenizer

BLOCK, NUM_BLOCKS = 4, 64
CONFIG = EngineConfig(
    compiles_decodes=True, block_size=BLOCK, num_blocks=NUM_BLOCKS, device="cpu", max_num_seqs=3, max_num_batched_tokens=8
)


@pytest.fixture(scope="module")
def stage(decoder: Decoder) -> Stage:
    return Stage(decoder, CONFIG)


def decodes(lengths: Sequence[int], seed: int = 0) -> ForwardBatch:
    """One more token for each context, whose blocks lie anywhere."""
    chance = random.Random(seed)
    free = chance.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = tuple(tuple(free.pop() for _ in range(length // BLOCK + 1)) for length in lengths)
    slots = tuple(table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, lengths, strict=True))
    num = len(lengths)
    return ForwardBatch(tuple(chance.randrange(256) for _ in lengths), tuple(lengths), slots, (1,) * num, tables, (), ())


def fill(stage: Stage) -> None:
    generator = torch.Generator().manual_seed(1)
    for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD):
        pages.normal_(generator=generator)


@torch.inference_mode()
def forward(stage: Stage, batch: ForwardBatch, *, is_compiled: bool) -> Tensor:
    fill(stage)
    with patch.object(stage, "compiled", stage.compiled if is_compiled else None):
        return stage.forward(batch)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[0], [9], [30], [3, 3], [1, 2, 40, 7, 0], [17] * 12], ids=str)
def test_compiled_steps_give_the_plain_numbers_and_leave_the_same_pages(stage: Stage, lengths: list[int]) -> None:
    batch = decodes(lengths)
    assert stage.compiled
    assert stage.compiled.takes(batch)
    plain_TC = forward(stage, batch, is_compiled=False)
    pages = [pages.clone() for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD)]
    torch.testing.assert_close(forward(stage, batch, is_compiled=True), plain_TC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([stage._cache.k_LKNPD, stage._cache.v_LKNPD], pages, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_other_steps_are_left_to_the_plain_blocks(stage: Stage) -> None:
    assert stage.compiled
    batch = decodes([9, 4])
    assert not stage.compiled.takes(replace(batch, adapters=(1, 0)))
    chunk = ForwardBatch((1, 2, 3), (0, 1, 5), (0, 1, 9), (2, 1), ((0,), (1, 2)), (), ())
    assert not stage.compiled.takes(chunk), "a prompt is among them"
    with patch.object(attention, "_SPLIT_DECODES", 8):
        assert not stage.compiled.takes(decodes([40, 2, 2])), "padding to the longest costs more"
    with patch.object(DecodeAttention, "__call__", side_effect=AssertionError):
        stage.forward(chunk)


@pytest.mark.slow
def test_answers_are_those_of_the_plain_dense_loop(
    stage: Stage, decoder: Decoder, tokenizer: Tokenizer, greedy_dense: Callable[[Sequence[int], int], tuple[int, ...]]
) -> None:
    """They begin and end at different times, so steps are of one and of several, and of decodes among prompts."""
    engine = Engine(decoder.config, tokenizer, CONFIG, LocalRunner(stage))
    prompts = [[5, 6, 7], [8] * 21, [250, 3, 99, 4, 17, 2], [42]]
    answers = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    assert [answer.token_ids for answer in answers] == [greedy_dense(prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("window", [None, 1, 5])
@torch.inference_mode()
def test_its_attention_is_that_over_pages(decoder: Decoder, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(decoder.config, range(2), NUM_BLOCKS, BLOCK, torch.float32, torch.device("cpu"))
    for pages in (cache.k_LKNPD, cache.v_LKNPD):
        pages.normal_(generator=generator)
    batch = decodes([1, 2, 40, 7, 0])
    num_heads, num_kv_heads = cache.heads
    q, k, v = (torch.randn(5, heads, 8, generator=generator) for heads in (num_heads, num_kv_heads, num_kv_heads))
    found = attends(cache, batch)(1)(1, q, k, v, window=window)
    torch.testing.assert_close(found, PagedAttention(cache, batch)(1, q, k, v, window=window))


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "int8_dynamic"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_product_is_one_operation_of_compiled_code_and_the_same(settings: dict[str, str]) -> None:
    config = EngineConfig.model_validate(settings)
    dtype = torch.float16 if config.dtype == "float16" else torch.float32
    linear = make_pack(config, dtype, torch.device("cpu"))([torch.nn.Linear(64, 48, dtype=dtype)])
    x_TI = torch.randn(3, 64)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    torch.testing.assert_close(torch.compile(linear, backend=keep, fullgraph=True)(x_TI), linear(x_TI), rtol=0, atol=0)
    assert graphs[0].count("powerhouse.kernel_linear") == 1


def test_without_a_compiler_the_reason_is_told(stage_settings: EngineConfig) -> None:
    with (
        patch.object(compiled, "_compile", side_effect=RuntimeError("No working C++ compiler found\nin ...")),
        pytest.raises(ConfigError, match=r"cannot be compiled\n  got: No working C\+\+ compiler found\n  do: install"),
    ):
        Stage(tiny_decoder(), stage_settings)


def test_code_that_computes_other_numbers_is_refused(stage_settings: EngineConfig) -> None:
    def wrong(*_: object) -> Callable[..., Tensor]:
        return lambda block, x_BC, attend, rope: x_BC

    with patch.object(compiled, "_compile", wrong), pytest.raises(ConfigError, match="wrong numbers here\n  got: off by"):
        Stage(tiny_decoder(), stage_settings)


def test_a_device_that_is_no_cpu_is_refused() -> None:
    cache = SimpleNamespace(k_LKNPD=torch.empty(0, device="meta"))
    with pytest.raises(ConfigError, match="on a CPU only\n  got: meta"):
        CompiledDecodes(SimpleNamespace(), cache)  # type: ignore[arg-type]


@pytest.fixture
def stage_settings() -> EngineConfig:
    return EngineConfig(compiles_decodes=True, num_blocks=8, device="cpu")
