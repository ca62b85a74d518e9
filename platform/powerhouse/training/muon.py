"""Muon for the matrices inside the blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for all else.

A matrix' step is its momentum with all singular values made about one, scaled to the size of an AdamW step (Liu et al.
2025, section 2.2), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
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
            matrices = [p for p in group["params"] if p.grad is not None] if group["is_matrix"] else []
            for some in _rounds(matrices):
                directions = orthogonalise_shared([self._blend(parameter) for parameter in some])
                for parameter, direction in zip(some, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * _LIKE_ADAMW * math.sqrt(max(parameter.shape)))
                    parameter.grad = None  # AdamW passes over what has no gradient
        super().step()

    def _blend(self, parameter: Tensor) -> Tensor:
        """The gradient and its running mean, as Nesterov's momentum has them."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # not used, but AdamW asks every loaded state for one
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(mean, self.momentum)


def _rounds(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """As many as there are ranks at a time, of about one size."""
    matrices = sorted(matrices, key=Tensor.numel)
    num_ranks = matrices[0].device_mesh.size() if matrices and isinstance(matrices[0], DTensor) else 1
    for start in range(0, len(matrices), num_ranks):
        yield matrices[start : start + num_ranks]


def orthogonalise_shared(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalise` of each; of sharded ones a rank does one, the whole of it, and deals its slices out. A collective."""
    sharded = [matrix for matrix in matrices if isinstance(matrix, DTensor)]
    if not sharded:
        return [orthogonalise(matrix) for matrix in matrices]
    rank, own = sharded[0].device_mesh.get_rank(), None
    for owner, matrix in enumerate(sharded):
        whole = matrix.full_tensor()
        own = whole if owner == rank else own
    done = None if own is None else orthogonalise(own)  # after the last gathering, for which the others would wait
    return [_deal_out(done if owner == rank else None, matrix, owner) for owner, matrix in enumerate(sharded)]


def _deal_out(whole: Tensor | None, like: DTensor, owner: int) -> DTensor:
    """A matrix that its owner alone has, cut as `like` is: first to the ranks of the owner's copy, then to other copies."""
    mesh = like.device_mesh
    shards, copies = mesh["shard"], mesh["copy"] if mesh.ndim > 1 else None
    owner_copy, owner_place = divmod(owner, shards.size())
    local = torch.empty_like(like.to_local())
    if copies is None or copies.get_local_rank() == owner_copy:
        given = local.new_empty(()).expand(like.shape) if whole is None else whole
        local = distribute_tensor(given, shards, [like.placements[-1]], src_data_rank=owner_place).to_local().contiguous()
    if copies is not None:
        dist.broadcast(local, group=copies.get_group(), group_src=owner_copy)
    return DTensor.from_local(local, mesh, like.placements, shape=like.shape, stride=like.stride())


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
