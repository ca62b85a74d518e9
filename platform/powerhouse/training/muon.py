"""Muon for the matrices inside the blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for all else.

A matrix' step is its momentum with all singular values made about one, scaled to the size of an AdamW step (Liu et al.
2025, section 2.2), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5
_LIKE_ADAMW = 0.2
"""Root mean square of an AdamW step in units of the learning rate (Liu et al. 2025, section 2.2)."""


class Muon(torch.optim.AdamW):
    """Groups with `is_matrix` are Muon's, the others AdamW's."""

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes the gradients"
        for group in self.param_groups:
            for parameter in group["params"] if group["is_matrix"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW passes over what has no gradient
        super().step()

    def _step_matrix(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # not used, but AdamW asks every loaded state for one
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        direction = _on_whole_matrix(gradient.lerp(mean, self.momentum))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(direction, alpha=-lr * _LIKE_ADAMW * math.sqrt(max(parameter.shape)))


def _on_whole_matrix(matrix: Tensor) -> Tensor:
    """`orthogonalise` of a matrix that may be sharded: gathered, done alike on every rank, and cut again."""
    if not isinstance(matrix, DTensor):
        return orthogonalise(matrix)
    whole = orthogonalise(matrix.full_tensor())
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values between 0.5 and 1.5, by Newton-Schulz iterations.

    In bfloat16 on a GPU; in float32 on a CPU, where runs over other numbers of workers are to agree.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.mT if is_tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return (x.mT if is_tall else x).to(matrix.dtype)
