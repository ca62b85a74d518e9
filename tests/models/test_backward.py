"""What has its gradient written out, beside autograd's chain of the same formula, which the layers are without gradients."""

from __future__ import annotations

import pytest
import torch

from powerhouse.models.backward import rms_norm, rotate
from powerhouse.models.layers import RMSNorm, apply_rope
from powerhouse.models.rope import rope_angles

B, T, H, D, C = 2, 5, 3, 8, 24


def fresh(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)


@pytest.mark.parametrize("shape", [(B, T, C), (T, C), (C,)])
def test_the_norm_and_its_gradients_are_those_of_its_formula(shape: tuple[int, ...]) -> None:
    x, weight = fresh(*shape), (1 + fresh(C).detach()).requires_grad_()
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1) * weight

    torch.testing.assert_close(rms_norm(x, weight, 0.1), plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), (x, weight))


@pytest.mark.parametrize("shape", [(B, T, H, D), (T, H, D)])
def test_the_rotation_turns_back_what_comes_back(shape: tuple[int, ...]) -> None:
    x, (cos_TD, sin_TD) = fresh(*shape), rope_angles(torch.arange(T), D, 100.0)
    cos, sin = cos_TD.double().unsqueeze(-2), sin_TD.double().unsqueeze(-2)

    torch.testing.assert_close(rotate(x, cos, sin), x * cos + x.roll(D // 2, dims=-1) * sin, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_the_layers_give_the_same_with_and_without_gradients() -> None:
    x, norm, angles = fresh(B, T, H, D).float(), RMSNorm(D, 1e-5), rope_angles(torch.arange(T), D, 100.0)
    with torch.no_grad():
        without = norm(x), apply_rope(x, *angles)

    torch.testing.assert_close((norm(x), apply_rope(x, *angles)), without, rtol=1e-6, atol=1e-6)
