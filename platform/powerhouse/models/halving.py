"""Causal attention of whole rows on a CPU, for training: torch's fused kernel, spared most of what no query sees.

Shapes: B rows, T positions, H heads, D head width; N pieces of rows, C positions in a piece.

torch 2.13's kernel takes 512 keys at a time and computes them all, also those after the query. But the second half of a row
sees the whole first half, and each half is a row again: causal attention is short causal pieces and, for each doubling of
their length, squares without a mask. In the forward pass the parts of a query's keys are joined by their log-sum-exps (Rabe
and Staats 2021); in the backward pass, where that of the whole row is known, their gradients are added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEWEST = 128
"""Positions in a piece that is not halved: half as many took as long."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_halve(num_positions: int) -> bool:
    """Whether rows of this length have two halves that are long enough."""
    return num_positions % 2 == 0 and num_positions >= 2 * _FEWEST


def halved_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(Q K^T / sqrt(D)) V of as many queries as keys, and as many key heads as query heads: [B, T, H, D]."""
    out: Tensor = _attend(q.contiguous(), k.contiguous(), v.contiguous())[0]
    return out


@torch.library.custom_op("powerhouse::halved_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the logarithm of each query's sum of exp(score): [B, T, H]."""
    length = _piece_length(q.shape[1])
    parts = _flash(*(_pieces(x, length) for x in (q, k, v)), 0.0, True)
    out_BTHD, total_BTH = (
        part.transpose(1, 2).reshape(shape) for part, shape in zip(parts, (q.shape, q.shape[:3]), strict=True)
    )
    while length < q.shape[1]:
        more_NHCD, more_total_NHC = _flash(_half(q, length, 1), _half(k, length, 0), _half(v, length, 0), 0.0, False)
        out_NHCD, total_NHC = _half(out_BTHD, length, 1), _half(total_BTH, length, 1)
        share_NHC = torch.sigmoid(more_total_NHC - total_NHC)
        out_NHCD.lerp_(more_NHCD, share_NHC.unsqueeze(-1).to(out_NHCD.dtype))
        total_NHC.copy_(torch.logaddexp(total_NHC, more_total_NHC))
        length *= 2
    return out_BTHD, total_BTH


@torch.library.custom_op("powerhouse::halved_attention_backward", mutates_args=())
def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values."""
    length = _piece_length(q.shape[1])
    parts = _flash_backward(*(_pieces(x, length) for x in (grad, q, k, v, out, total)), 0.0, True)
    of_q, of_k, of_v = (part.transpose(1, 2).reshape(q.shape) for part in parts)
    while length < q.shape[1]:
        halves = (_half(x, length, number) for x, number in ((grad, 1), (q, 1), (k, 0), (v, 0), (out, 1), (total, 1)))
        more = _flash_backward(*halves, 0.0, False)
        for whole, part, number in zip((of_q, of_k, of_v), more, (1, 0, 0), strict=True):
            _half(whole, length, number).add_(part)
        length *= 2
    return of_q, of_k, of_v


def _piece_length(num_positions: int) -> int:
    while can_halve(num_positions):
        num_positions //= 2
    return num_positions


def _pieces(x_BTH: Tensor, length: int) -> Tensor:
    """[N, H, C] and what axes follow: every piece of this length, a view."""
    return x_BTH.view(-1, length, *x_BTH.shape[2:]).transpose(1, 2)


def _half(x_BTH: Tensor, length: int, number: int) -> Tensor:
    """[N, H, C] and what axes follow: the first or the second half of each two pieces of this length, a view."""
    return x_BTH.view(-1, 2, length, *x_BTH.shape[2:])[:, number].transpose(1, 2)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_gradients.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _gradients(grad.contiguous(), *ctx.saved_tensors)
    return gradients


_attend.register_autograd(_backward, setup_context=_keep)
HALVED_ATTENTION = torch.ops.powerhouse.halved_attention.default
"""What recomputation keeps."""
