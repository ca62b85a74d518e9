from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fakes import tiny_decoder, write_tiny_adapter, write_tiny_model
from powerhouse.engine import Engine, EngineConfig, LocalRunner, SamplingParams, native
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.compiled import CompiledBlocks
from powerhouse.engine.formats import Int8Linear, quantize_int8
from powerhouse.engine.native import Kind, Weights
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.adapters import LoRAConfig
from powerhouse.models.decoder import Decoder
from powerhouse.tokenizer import Tokenizer

BLOCK, NUM_BLOCKS = 4, 64
CONFIG = EngineConfig(
    compiles=True, block_size=BLOCK, num_blocks=NUM_BLOCKS, device="cpu", max_num_seqs=3, max_num_batched_tokens=8
)


@pytest.fixture(scope="module")
def stage(decoder: Decoder) -> Stage:
    return Stage(decoder, CONFIG)


def make_batch(
    spans: Sequence[tuple[int, int]], seed: int = 0, block_size: int = BLOCK, num_blocks: int = NUM_BLOCKS
) -> ForwardBatch:
    """Tokens from one position to before another of each context, whose blocks lie anywhere."""
    chance = random.Random(seed)
    free = chance.sample(range(num_blocks), num_blocks)
    tables = tuple(tuple(free.pop() for _ in range((stop - 1) // block_size + 1)) for _, stop in spans)
    positions = tuple(position for span in spans for position in range(*span))
    slots = tuple(
        table[at // block_size] * block_size + at % block_size
        for table, span in zip(tables, spans, strict=True)
        for at in range(*span)
    )
    token_ids = tuple(chance.randrange(256) for _ in positions)
    return ForwardBatch(token_ids, positions, slots, tuple(stop - start for start, stop in spans), tables, (), ())


def decodes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """One more token for each context."""
    return [(length, length + 1) for length in lengths]


def fill(stage: Stage) -> None:
    generator = torch.Generator().manual_seed(1)
    for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD):
        pages.normal_(generator=generator)


@torch.inference_mode()
def forward(stage: Stage, batch: ForwardBatch, *, is_compiled: bool) -> Tensor:
    fill(stage)
    with patch.object(stage, "compiled", stage.compiled if is_compiled else None):
        return stage.forward(batch)


def assert_alike(stage: Stage, spans: Sequence[tuple[int, int]], tolerance: float) -> None:
    num_blocks, block_size = stage._cache.k_LKNPD.shape[2:4]
    batch = make_batch(spans, block_size=block_size, num_blocks=num_blocks)
    assert stage.compiled
    assert stage.compiled.takes(batch)
    plain_TC = forward(stage, batch, is_compiled=False)
    pages = [pages.clone() for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD)]
    assert_near(forward(stage, batch, is_compiled=True), plain_TC, tolerance)
    for found, expected in zip((stage._cache.k_LKNPD, stage._cache.v_LKNPD), pages, strict=True):
        assert_near(found, expected, tolerance)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() < tolerance * expected.norm()


SPANS = [
    decodes([0]),
    decodes([9]),
    decodes([3, 3]),
    decodes([1, 2, 40, 7, 0]),
    decodes([17] * 12),
    [(0, 2)],
    [(0, 100)],  # several tiles of queries and of keys
    [(31, 33), (95, 100)],
    [(40, 80), (0, 33), (5, 6), (63, 66), (0, 1)],
]


@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_compiled_steps_give_the_plain_numbers_and_leave_the_same_pages(stage: Stage, spans: list[tuple[int, int]]) -> None:
    assert_alike(stage, spans, 1e-5)


CHANGES: list[dict[str, Any]] = [
    {},
    {"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
    {"has_qk_norm": True},
    {"sliding_window": 5},
    {"sliding_window": 50},
    {"head_dim": 64},  # whose sums stay in registers
]
STEPS = [decodes([11]), decodes([1, 2, 40, 7, 0]), decodes([17] * 12), [(0, 100)], [(40, 80), (0, 9), (5, 6)]]


def make_stage(weights: str, changes: dict[str, Any], *, is_plain: bool) -> Stage:
    """With the products of native.cpp, or without those that need this processor's instructions."""
    config = CONFIG.model_copy(update={"quantization": weights if weights.startswith("int") else None})
    decoder = tiny_decoder(**changes).to(torch.bfloat16 if weights == "bfloat16" else torch.float32)
    with patch.object(native, "multiplies", lambda kind: not is_plain and bool(native.load().multiplies(kind))):
        return Stage(decoder, config)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "int8", "int8_dynamic"])
def test_so_they_do_for_every_kind_of_block_and_of_weights(weights: str, is_plain: bool, changes: dict[str, Any]) -> None:
    stage = make_stage(weights, changes, is_plain=is_plain)
    # Where activations are rounded, a last bit can tip a rounding.
    tolerance = {"bfloat16": 5e-3, "int8": 0.03, "int8_dynamic": 5e-3}.get(weights, 1e-5)
    for spans in STEPS:
        assert_alike(stage, spans, tolerance)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 128}, {"sliding_window": 150}], ids=str)
@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 16], ids="{} heads".format)
@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 256), (24, 192), (512, 9)])
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_so_do_decodes_of_long_contexts_in_pages_of_any_size(
    pages_dtype: torch.dtype, block_size: int, num_blocks: int, num_heads: int, changes: dict[str, Any]
) -> None:
    """Heads in groups that registers hold and what is left of them; whole vectors of keys in a page and parts of one."""
    heads = {"head_dim": 64, "num_attention_heads": num_heads, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = CONFIG.model_copy(update={"block_size": block_size, "num_blocks": num_blocks})
    with patch("powerhouse.engine.stage.pages_dtype", return_value=pages_dtype):
        stage = Stage(tiny_decoder(**heads | changes), config)
    assert stage._cache.k_LKNPD.dtype == pages_dtype
    tolerance = 1e-5 if pages_dtype == torch.float32 else 1e-3  # a last bit can tip a rounding
    for lengths in ([300], [127, 128, 129, 400, 0, 15, 16, 33, 255]):
        assert_alike(stage, decodes(lengths), tolerance)


def test_a_step_is_one_call_where_all_products_are_native() -> None:
    for weights, kind, fewer in (("bfloat16", Kind.BFLOAT16, 0), ("int8_dynamic", Kind.INT8, 1)):
        for is_plain in (False, True):
            compiled = make_stage(weights, {}, is_plain=is_plain).compiled
            assert isinstance(compiled, CompiledBlocks)
            is_native = not is_plain and native.multiplies(kind)
            assert compiled._most_rows == (sys.maxsize if is_native else fewer)


def test_steps_with_adapters_are_left_to_the_plain_blocks(stage: Stage) -> None:
    assert stage.compiled
    batch = make_batch(decodes([9, 4]))
    assert stage.compiled.takes(batch)
    assert not stage.compiled.takes(replace(batch, adapters=(1, 0)))


@torch.inference_mode()
def test_steps_of_nobodys_adapters_are_compiled_beneath_them(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    kinds: list[tuple[dict[str, Any], float]] = [
        ({}, 1e-5),
        ({"quantization": "int8"}, 0.03),
        ({"dtype": "bfloat16"}, 5e-3),
        ({"quantization": "int8_dynamic"}, 5e-3),
    ]
    for settings, tolerance in kinds:
        stage = Stage.load(base, CONFIG.model_copy(update={"adapters": {"a": adapter}} | settings))
        assert_alike(stage, [*decodes([5, 9]), (0, 7)], tolerance)
        mixed = replace(make_batch([(0, 7), (3, 4)]), adapters=(1, 0))  # the plain blocks, by the same weights
        assert stage.forward(mixed).isfinite().all()


def test_answers_are_those_of_the_plain_dense_loop(
    stage: Stage, decoder: Decoder, tokenizer: Tokenizer, greedy_dense: Callable[[Sequence[int], int], tuple[int, ...]]
) -> None:
    """They begin and end at different times, so steps are of one and of several, and of decodes among chunks of prompts."""
    engine = Engine(decoder.config, tokenizer, CONFIG, LocalRunner(stage))
    prompts = [[5, 6, 7], [8] * 21, [250, 3, 99, 4, 17, 2], [42]]
    answers = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    assert [answer.token_ids for answer in answers] == [greedy_dense(prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("quantization", ["int8", "int8_dynamic"])
@torch.inference_mode()
def test_the_vocabulary_is_projected_as_by_the_plain_stage(decoder: Decoder, quantization: str, num_rows: int) -> None:
    stage = Stage(decoder, CONFIG.model_copy(update={"quantization": quantization}))
    x_TC = torch.randn(num_rows, decoder.config.hidden_size, generator=torch.Generator().manual_seed(2))
    assert stage.compiled
    assert_near(stage.compiled.project(x_TC), stage.decoder.project(x_TC), 0.01 if quantization == "int8" else 1e-5)


def rounded_rows(x_TI: Tensor, levels: int) -> Tensor:
    """Rows of steps of their largest number, in fp64."""
    steps_T1 = x_TI.abs().amax(1, keepdim=True) / levels
    return (x_TI / steps_T1).round().double() * steps_T1


def make_weights(kind: Kind, num_outputs: int, num_inputs: int, bias_O: Tensor | None) -> tuple[Weights, Tensor, int | None]:
    """Also what they stand for [O, I], and how many steps activations have."""
    generator = torch.Generator().manual_seed(0)
    if kind is Kind.BFLOAT16:
        weight_OI = torch.randn(num_outputs, num_inputs, generator=generator).to(torch.bfloat16)
        return Weights.bfloat16(weight_OI, bias_O), weight_OI.double(), None
    codes_OI = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    scales_O = torch.rand(num_outputs, generator=generator)
    whole_OI = codes_OI.double() * scales_O[:, None]
    if kind is Kind.INT8:
        return Weights.int8(codes_OI, scales_O, bias_O), whole_OI, 127
    return Weights.codes(codes_OI, scales_O, bias_O, levels=1000, most_rows=8), whole_OI, 1000


KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not native.multiplies(kind), reason="the processor has no instructions for it"))
    for kind in (Kind.CODES, Kind.BFLOAT16, Kind.INT8)
]


@pytest.mark.parametrize("num_inputs", [1, 7, 96, 1536])
@pytest.mark.parametrize("num_rows", [1, 5, 21])
@pytest.mark.parametrize("num_outputs", [33, 64, 7])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_rounded_numbers(
    kind: Kind, has_bias: bool, num_outputs: int, num_rows: int, num_inputs: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(num_rows, num_inputs, generator=generator)
    bias_O = torch.randn(num_outputs, generator=generator) if has_bias else None
    if bias_O is not None and kind is Kind.BFLOAT16:
        bias_O = bias_O.to(torch.bfloat16)  # as models have it
    weights, whole_OI, levels = make_weights(kind, num_outputs, num_inputs, bias_O)
    rounded_TI = rounded_rows(x_TI, levels) if levels else x_TI.to(torch.bfloat16).double()
    expected_TO = F.linear(rounded_TI, whole_OI, None if bias_O is None else bias_O.double())
    torch.testing.assert_close(weights.multiply(x_TI).double(), expected_TO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums_do_not_overflow(kind: Kind, sign: int) -> None:
    weight_OI = torch.full((4, 4096), float(sign))
    weights = Weights.bfloat16(weight_OI.to(torch.bfloat16), None) if kind is Kind.BFLOAT16 else None
    if kind is Kind.INT8:
        weights = Weights.int8(*quantize_int8(weight_OI), None)
    weights = weights or Int8Linear(weight_OI, None).native
    torch.testing.assert_close(weights.multiply(torch.ones(1, 4096)), torch.full((1, 4), 4096.0 * sign), rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_is_zero_and_what_is_not_finite_spoils_its_own_row_alone(kind: Kind) -> None:
    weights, _, _ = make_weights(kind, 16, 24, None)
    x_TI = torch.zeros(4, 24)
    x_TI[1, 3], x_TI[2, 5], x_TI[3] = float("nan"), float("inf"), 1.0
    out_TO = weights.multiply(x_TI)
    assert (out_TO[0] == 0).all()
    assert not out_TO[1:3].isfinite().any()
    assert out_TO[3].isfinite().all()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no-such-compiler cannot compile\n  got: .*No such file.*\n  do: install"),
        ("false", "false cannot compile\n  got: exit status 1\n  do: install"),
        ("g++ --no-such-option", "cannot compile\n  got: .*unrecognized.*\n  do: install"),
    ],
)
def test_without_a_compiler_that_works_the_reason_is_told(
    stage_settings: EngineConfig, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with patch.object(native, "load", native.load.__wrapped__), pytest.raises(ConfigError, match=reason):
        Stage(tiny_decoder(), stage_settings)


def test_code_that_computes_other_numbers_is_refused(stage_settings: EngineConfig) -> None:
    with (
        patch.object(CompiledBlocks, "_normalise", lambda _, norm, x_TC: x_TC),
        pytest.raises(ConfigError, match="wrong numbers here\n  got: off by"),
    ):
        Stage(tiny_decoder(), stage_settings)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="on a CPU only\n  got: meta"):
        CompiledBlocks(SimpleNamespace(), SimpleNamespace(k_LKNPD=torch.empty(0, device="meta")))  # type: ignore[arg-type]


@pytest.fixture
def stage_settings() -> EngineConfig:
    return EngineConfig(compiles=True, num_blocks=8, device="cpu")
