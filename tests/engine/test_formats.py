from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.device import computes_bfloat16
from powerhouse.engine import EngineConfig
from powerhouse.engine.formats import GROUP, compute_dtype, make_pack, quantize_int4, quantize_int8
from powerhouse.errors import ConfigError

CPU = torch.device("cpu")


def two_layers(*, has_bias: bool, num_inputs: int = 96) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(num_inputs, 32, bias=False), nn.Linear(num_inputs, 64, bias=has_bias)]


def rounded(weight_OI: Tensor, settings: dict[str, str]) -> Tensor:
    """The weights that the format stands for, in fp32."""
    quantization = settings.get("quantization")
    if quantization == "int4":
        codes_OI, grid_GO2 = quantize_int4(weight_OI)
        scale_OI, centre_OI = grid_GO2.to(torch.bfloat16).float().repeat_interleave(GROUP, dim=0).permute(2, 1, 0)
        return (codes_OI - 8) * scale_OI + centre_OI
    if quantization:
        codes_OI, scales_O = quantize_int8(weight_OI, 127 if quantization == "int8" else 64)
        scales_O = scales_O.to(torch.bfloat16).float() if quantization == "int8" else scales_O
        return codes_OI.float() * scales_O[:, None]
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return weight_OI.to(dtypes[settings["dtype"]]).float()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-6),
        ({"dtype": "float16"}, 1e-6),
        ({"dtype": "bfloat16"}, 1e-2 if computes_bfloat16("cpu") else 1e-6),
        ({"quantization": "int8"}, 1e-2),  # activations of 8 bits of mantissa
        ({"quantization": "int4"}, 1e-2),
        ({"quantization": "int8_dynamic"}, 1e-2),  # activations of 8 bits
    ],
    ids=str,
)
@torch.inference_mode()
def test_packed_layers_side_by_side_give_the_product_of_the_rounded_weights(
    settings: dict[str, str], tolerance: float, num_rows: int, has_bias: bool
) -> None:
    config = EngineConfig.model_validate(settings)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(config.dtype, torch.float32)
    layers = [layer.to(dtype) for layer in two_layers(has_bias=has_bias)]
    x_TI = torch.randn(num_rows, 96)
    expected = torch.cat(
        [
            F.linear(x_TI, rounded(layer.weight.float(), settings), None if layer.bias is None else layer.bias.float())
            for layer in layers
        ],
        dim=1,
    )
    out = make_pack(config, dtype, CPU)(layers)(x_TI.to(compute_dtype(dtype, CPU)))
    assert (out.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.01), ("int4", 0.1)])
def test_rounded_weights_are_near(quantization: str, error: float) -> None:
    weight_OI = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    assert (rounded(weight_OI, {"quantization": quantization}) - weight_OI).norm() < error * weight_OI.norm()


@pytest.mark.parametrize("sign", [1, -1])
@torch.inference_mode()
def test_the_largest_products_of_int8_dynamic_do_not_overflow(sign: int) -> None:
    layer = nn.Linear(96, 32, bias=False)
    layer.weight.fill_(sign)
    out = make_pack(EngineConfig(quantization="int8_dynamic"), torch.float32, CPU)([layer])(torch.ones(3, 96))
    torch.testing.assert_close(out, torch.full((3, 32), 96.0 * sign))


@torch.inference_mode()
def test_a_row_of_int8_dynamic_knows_nothing_of_the_others() -> None:
    layer = make_pack(EngineConfig(quantization="int8_dynamic"), torch.float32, CPU)(two_layers(has_bias=True))
    x_TI = torch.randn(4, 96) * torch.tensor([[1.0], [1000.0], [0.001], [0.0]])
    torch.testing.assert_close(layer(x_TI), torch.cat([layer(row[None]) for row in x_TI]))


def test_a_width_that_is_no_multiple_of_the_group_is_refused_for_int4() -> None:
    message = "quantization: int4 takes groups of 32 inputs\n  got: a layer of 40\n  do: use int8"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_pack(EngineConfig(quantization="int4"), torch.float32, CPU)(two_layers(has_bias=False, num_inputs=40))


def test_a_format_that_the_device_has_not_is_refused() -> None:
    message = "quantization: not on cuda\n  got: int8_dynamic\n  allowed: int8, int4"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_pack(EngineConfig(quantization="int8_dynamic"), torch.bfloat16, torch.device("cuda"))
