"""A norm and a rotation with their gradients written out: in training they go over memory half as often as autograd's chain.

Shapes: * leading axes, C model width, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Give x / sqrt(mean(x^2) + eps) * weight, both of one type, in that type."""
    normed: Tensor = _RmsNorm.apply(x, weight_C, eps)  # type: ignore[no-untyped-call]
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [*, D]: x * cos + (x with its halves swapped) * sin, where the sines' first half is minus the second."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        context.save_for_backward(x, weight_C, scale)
        normed = x * scale
        return normed.mul_(weight_C)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale: (grad * weight - n * mean(grad * weight * n)) * scale, and the sum of grad * n."""
        x, weight_C, scale = context.saved_tensors
        normed = x * scale
        product = grad * normed
        mean = (product @ weight_C).div_(x.shape[-1]).unsqueeze(-1)
        of_x = (grad * weight_C).sub_(normed.mul_(mean)).mul_(scale)
        return of_x, product.sum_to_size(weight_C.shape), None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
