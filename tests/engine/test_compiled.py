from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from ctypes import byref
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
from powerhouse.engine.compiled import CompiledDecodes
from powerhouse.engine.formats import Int8Linear
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.adapters import LoRAConfig
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


def assert_alike(stage: Stage, lengths: Sequence[int], tolerance: float) -> None:
    batch = decodes(lengths)
    assert stage.compiled
    assert stage.compiled.takes(batch)
    plain_TC = forward(stage, batch, is_compiled=False)
    pages = [pages.clone() for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD)]
    assert_near(forward(stage, batch, is_compiled=True), plain_TC, tolerance)
    for found, expected in zip((stage._cache.k_LKNPD, stage._cache.v_LKNPD), pages, strict=True):
        assert_near(found, expected, tolerance)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() < tolerance * expected.norm()


LENGTHS = [[0], [9], [30], [3, 3], [1, 2, 40, 7, 0], [17] * 12]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_compiled_steps_give_the_plain_numbers_and_leave_the_same_pages(stage: Stage, lengths: list[int]) -> None:
    assert_alike(stage, lengths, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
        {"has_qk_norm": True},
        {"sliding_window": 5},
        {"head_dim": 64},  # whose sums stay in registers
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int8_dynamic"])
def test_so_they_do_for_every_kind_of_block_and_of_weights(weights: str, changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"quantization": weights if weights.startswith("int") else None})
    stage = Stage(tiny_decoder(**changes).to(torch.bfloat16 if weights == "bfloat16" else torch.float32), config)
    assert stage.compiled
    assert stage.compiled._most_rows == {"int8": 8, "int8_dynamic": 1}.get(weights, 0)
    # Where activations are rounded, a last bit can tip a rounding.
    tolerance = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.03, "int8_dynamic": 1e-3}[weights]
    for lengths in ([11], [1, 2, 40, 7, 0], [17] * 12):
        assert_alike(stage, lengths, tolerance)


def test_other_steps_are_left_to_the_plain_blocks(stage: Stage) -> None:
    assert stage.compiled
    batch = decodes([9, 4])
    assert not stage.compiled.takes(replace(batch, adapters=(1, 0)))
    chunk = ForwardBatch((1, 2, 3), (0, 1, 5), (0, 1, 9), (2, 1), ((0,), (1, 2)), (), ())
    assert not stage.compiled.takes(chunk), "a prompt is among them"
    with patch.object(CompiledDecodes, "transform", side_effect=AssertionError):
        stage.forward(chunk)


@torch.inference_mode()
def test_steps_of_nobodys_adapters_are_compiled_beneath_them(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    for quantization in (None, "int8"):
        update = {"adapters": {"a": adapter}, "quantization": quantization}
        assert_alike(Stage.load(base, CONFIG.model_copy(update=update)), [5, 9], 0.03 if quantization else 1e-5)


def test_answers_are_those_of_the_plain_dense_loop(
    stage: Stage, decoder: Decoder, tokenizer: Tokenizer, greedy_dense: Callable[[Sequence[int], int], tuple[int, ...]]
) -> None:
    """They begin and end at different times, so steps are of one and of several, and of decodes among prompts."""
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


def multiply(codes: Codes, x_TI: Tensor) -> Tensor:
    num_outputs, num_inputs = codes.codes_OI.shape
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in codes[:3]]
    out_TO = torch.empty(len(x_TI), num_outputs)
    made = native.Product(*addresses, num_inputs, num_outputs, codes.levels)
    native.load().product(byref(made), x_TI.data_ptr(), out_TO.data_ptr(), len(x_TI), 2)
    return out_TO


@pytest.mark.parametrize("num_inputs", [1, 7, 96, 1536])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_of_codes_is_that_of_the_rounded_numbers(num_inputs: int, num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-127, 128, (33, num_inputs), generator=generator, dtype=torch.int8)
    scales_O, x_TI = torch.rand(33, generator=generator), torch.randn(num_rows, num_inputs, generator=generator)
    codes = Codes(codes_OI, scales_O, torch.randn(33, generator=generator) if has_bias else None, 1000, 8)
    largest_T1 = x_TI.abs().amax(1, keepdim=True)
    rounded_TI = (x_TI / largest_T1 * 1000).round()
    expected_TO = F.linear(rounded_TI.double(), codes_OI.double()) * scales_O * (largest_T1 / 1000)
    expected_TO = expected_TO if codes.bias_O is None else expected_TO + codes.bias_O
    torch.testing.assert_close(multiply(codes, x_TI).double(), expected_TO, rtol=1e-5, atol=1e-5)


def test_the_largest_sums_do_not_overflow() -> None:
    linear = Int8Linear(torch.ones(4, 4096), None)
    x_TI = torch.ones(1, 4096)
    torch.testing.assert_close(multiply(linear.codes, x_TI), linear(x_TI), rtol=0.01, atol=0)


def test_a_row_of_zeros_is_zero_and_what_is_not_finite_spoils_its_own_row_alone() -> None:
    codes = Int8Linear(torch.randn(16, 24), None).codes
    x_TI = torch.zeros(4, 24)
    x_TI[1, 3], x_TI[2, 5], x_TI[3] = float("nan"), float("inf"), 1.0
    out_TO = multiply(codes, x_TI)
    assert (out_TO[0] == 0).all()
    assert out_TO[1:3].isnan().all()
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
        patch.object(CompiledDecodes, "_normalise", lambda _, norm, x_TC: x_TC),
        pytest.raises(ConfigError, match="wrong numbers here\n  got: off by"),
    ):
        Stage(tiny_decoder(), stage_settings)


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        (torch.empty(0, device="meta"), "on a CPU only\n  got: meta"),
        (torch.empty(0, dtype=torch.bfloat16), "computes in float32\n  got: torch.bfloat16"),
    ],
    ids=["device", "precision"],
)
def test_other_devices_and_precisions_are_refused(pages: Tensor, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CompiledDecodes(SimpleNamespace(), SimpleNamespace(k_LKNPD=pages))  # type: ignore[arg-type]


@pytest.fixture
def stage_settings() -> EngineConfig:
    return EngineConfig(compiles_decodes=True, num_blocks=8, device="cpu")
