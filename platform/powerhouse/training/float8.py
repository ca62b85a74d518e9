"""Linear layers that multiply in 8 bits: e4m3 forward, e5m2 for gradients (Micikevicius et al. 2022).

One scale for each whole tensor, found anew at each use. Parameters, their gradients and what is between the layers stay as
they are. Shapes: N tokens, I inputs, O outputs; N is filled up with zeros to a multiple of 16, which the kernels ask for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.errors import ConfigError
from powerhouse.training.sharding import blocks_of

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16
_FIRST_CAPABILITY = (8, 9)


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Have every linear layer of the blocks multiply in 8 bits; the head and the embedding do not.

    Raises:
        ConfigError: the GPU has no 8-bit products, or a layer's width is not a multiple of 16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        raise ConfigError(
            "precision: this GPU has no 8-bit products",
            got=f"float8 on {torch.cuda.get_device_name(device)}",
            allowed="float8 on Ada, Hopper and later",
            do="use precision=bfloat16",
        )
    for block in blocks_of(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                _check_widths(name, module)
                module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _check_widths(name: str, linear: nn.Linear) -> None:
    if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
        raise ConfigError(
            f"precision: float8 needs widths that are multiples of {_MULTIPLE}, but {name} has others",
            got=f"{linear.in_features} x {linear.out_features}",
            do="use precision=bfloat16, or another model shape",
        )


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    x_NI = x.flatten(0, -2)
    num_tokens = len(x_NI)
    x_NI = F.pad(x_NI, (0, 0, 0, -num_tokens % _MULTIPLE))
    out_NO: Tensor = _Product.apply(x_NI, linear.weight)  # type: ignore[no-untyped-call]
    out = out_NO[:num_tokens].view(*x.shape[:-1], linear.out_features)
    return out if linear.bias is None else out + linear.bias


class _Product(torch.autograd.Function):
    """x_NI @ w_OI.T; the first operand of an 8-bit product must lie row by row in memory, the second column by column."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor) -> Tensor:
        x8_NI, x_scale = quantise(x_NI, _E4M3)
        w8_OI, w_scale = quantise(w_OI, _E4M3)
        ctx.save_for_backward(x8_NI, x_scale, w_OI)
        return torch._scaled_mm(x8_NI, w8_OI.t(), x_scale, w_scale, out_dtype=x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x8_NI, x_scale, w_OI = ctx.saved_tensors
        [gradient_NO] = gradients
        g8_NO, g_scale = quantise(gradient_NO, _E5M2)
        w8_OI, w_scale = quantise(w_OI, _E4M3)
        dtype = gradient_NO.dtype
        x_gradient = torch._scaled_mm(g8_NO, _by_column(w8_OI), g_scale, w_scale, out_dtype=dtype)
        w_gradient = torch._scaled_mm(g8_NO.t().contiguous(), _by_column(x8_NI), g_scale, x_scale, out_dtype=dtype)
        return x_gradient, w_gradient


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, the float32 scalar to multiply it by): the largest value becomes the type's largest."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _by_column(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()
