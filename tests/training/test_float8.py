"""Products in 8 bits are those of the values that 8 bits hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import run_on_ranks
from fakes import tiny_config, tiny_decoder
from powerhouse.errors import ConfigError
from powerhouse.models.layers import Linear
from powerhouse.training.config import TrainingConfig
from powerhouse.training.float8 import quantise, use_float8
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train_step
from powerhouse.training.objectives import causal_language_model
from tiny_run import make_config, random_batch, sharded_model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class OneLinear(torch.nn.Module):
    def __init__(self, device: str = "cpu", num_inputs: int = 64, num_outputs: int = 32) -> None:
        super().__init__()
        self.linear = Linear(num_inputs, num_outputs, device=device, dtype=torch.bfloat16)
        torch.nn.init.normal_(self.linear.weight, generator=torch.Generator(device).manual_seed(0))
        torch.nn.init.normal_(self.linear.bias, generator=torch.Generator(device).manual_seed(1))

    def blocks(self) -> dict[str, torch.nn.Module]:
        return {"0": self}


def passes(model: OneLinear, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    x_BTI = torch.randn(3, 7, 64, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.randn(3, 7, 32, generator=generator, device=device, dtype=torch.bfloat16)
    out = model.linear(x_BTI)
    out.backward(gradient)
    return {"x": x_BTI, "g": gradient, "out": out, "x_gradient": x_BTI.grad, "w_gradient": model.linear.weight.grad}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values, scale = quantise(x.detach(), dtype)
    return values.float() * scale


def test_forward_and_backward_are_the_products_of_the_rounded_values() -> None:
    model = OneLinear()
    use_float8(model, torch.device("cpu"))

    got = passes(model)

    x, g, w = rounded(got["x"], E4M3), rounded(got["g"], E5M2), rounded(model.linear.weight, E4M3)
    expected = {
        "out": x @ w.T + model.linear.bias,
        "x_gradient": g @ w,
        "w_gradient": g.flatten(0, 1).T @ x.flatten(0, 1),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].float(), tensor.float(), rtol=1e-2, atol=0.1, msg=name)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_largest_value_is_kept_and_none_is_lost_to_infinity(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -3e5, 7.0, 1e-3])

    values, scale = quantise(x, dtype)

    assert values.float().isfinite().all()
    assert float(values.float()[1] * scale) == pytest.approx(-3e5)
    assert quantise(torch.zeros(4), dtype)[0].float().eq(0).all()


def losses_of(configs: list[TrainingConfig]) -> list[list[float]]:
    found = []
    for config in configs:
        model, optimizer = sharded_model(config)
        guard = Guard(config.optim)
        found.append(
            [
                train_step(step, model, optimizer, guard, causal_language_model, random_batch(), config.run).loss
                for step in range(6)
            ]
        )
    return found


@pytest.mark.slow
def test_a_sharded_model_learns_in_8_bits_as_in_bfloat16_nearly(tmp_path: Path) -> None:
    shape = tiny_config(num_hidden_layers=2).model_dump()
    configs = [make_config(tmp_path, model=shape, precision=precision) for precision in ("bfloat16", "float8")]

    (half, eighth), _ = run_on_ranks(2, losses_of, configs)

    assert eighth == pytest.approx(half, rel=0.06)
    assert eighth != half
    assert eighth[-1] < eighth[0] - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 72}, r"but mlp\.gate_proj has others\n  got: 32 x 72\n  do: use precision=bfloat16"),
        ({"head_dim": 6, "num_attention_heads": 4}, r"but self_attn\.q_proj has others\n  got: 32 x 24"),
    ],
)
def test_a_width_that_the_kernels_do_not_take_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        use_float8(tiny_decoder(**changes), torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_8_bits_are_near_bfloat16_or_refused() -> None:
    plain, eighth = OneLinear("cuda"), OneLinear("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ConfigError, match="this GPU has no 8-bit products"):
            use_float8(eighth, torch.device("cuda"))
        return
    use_float8(eighth, torch.device("cuda"))

    expected, got = passes(plain, "cuda"), passes(eighth, "cuda")

    for name in ("out", "x_gradient", "w_gradient"):
        error = (got[name] - expected[name]).float().norm() / expected[name].float().norm()
        assert error < 0.1, name
