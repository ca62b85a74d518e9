"""Parameters, FLOPs and peaks beside what others publish and what torch counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fakes import tiny_config
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.model import ModelConfig
from powerhouse.training.batches import Noise
from powerhouse.training.flops import count_parameters, find_device, measure_matmul, row_flops
from powerhouse.training.methods import method_of
from powerhouse.training.noise import SpanLengths

TINY_ENCODER = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
TINY_T5 = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 3,
    "num_attention_heads": 4, "head_dim": 8, "is_gated": True,
}  # fmt: skip


def on_meta(shape: ModelConfig) -> Any:
    with torch.device("meta"):
        return method_of(shape).model_class(shape)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (DecoderConfig.model_validate("smollm2-135m"), 134_515_008),
        (DecoderConfig.model_validate("llama-3.2-1b"), 1_235_814_400),
        (DecoderConfig.model_validate("mistral-7b"), 7_248_023_552),
        (DecoderConfig.model_validate("llama-3.1-8b"), 8_030_261_248),
        (EncoderConfig.model_validate("bert-base"), 109_514_298),
        (T5Config.model_validate("t5-small"), 60_506_624),
    ],
)
def test_a_model_has_as_many_parameters_as_its_maker_says(shape: ModelConfig, published: int) -> None:
    assert count_parameters(on_meta(shape)) == published


@pytest.mark.parametrize(
    "shape",
    [
        tiny_config(),
        tiny_config(tie_word_embeddings=False, num_key_value_heads=4, head_dim=16),
        EncoderConfig.model_validate(TINY_ENCODER),
        T5Config.model_validate(TINY_T5),
    ],
)
def test_the_formula_counts_what_torch_counts_forward_and_backward(shape: ModelConfig) -> None:
    method, model, num_rows = method_of(shape), on_meta(shape), 3
    num_spans = SpanLengths.of(49, 0.15, 3.0).num_spans
    noise = Noise(0, 0.15, 3.0, shape.vocab_size, 0, 0, (), (0,) * num_spans)
    batch = method.batch(np.ones((num_rows, 49), dtype=np.int32), np.arange(num_rows), noise, torch.device("cpu"))
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}

    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(method.objective(model, batch)[0])

    ours = num_rows * row_flops(model, {name: tensor.shape[1] for name, tensor in batch.items()}).total
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_frozen_weight_costs_no_gradient_of_its_own() -> None:
    model = on_meta(tiny_config())
    whole = row_flops(model, {"inputs": 16})
    model.requires_grad_(False)

    assert row_flops(model, {"inputs": 16}).weights * 6 == whole.weights * 4
    assert row_flops(model, {"inputs": 16}).attention == whole.attention


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_found_by_the_name_that_its_driver_gives(name: str, peak: float | None) -> None:
    found = find_device(name)

    assert (found.peak_tflops if found else None) == peak


def test_a_cpu_does_some_work_in_a_second() -> None:
    assert 1e8 < measure_matmul(torch.float32, largest=64, seconds=0.01) < 1e14
