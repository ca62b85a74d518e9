"""Bytes that a training process holds at its worst moment, known before it starts.

Weights, gradients and the optimiser's state are arithmetic. What the backward pass needs of the forward pass is counted on
the meta device: the run's own objective on the run's own model, with every tensor that autograd keeps, and no memory. Only
attention is replaced, by what a fused kernel keeps (queries, keys, values, output, a number for each query; Dao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from powerhouse.training.objectives import Batch, Objective

_FP32 = 4
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Memory:
    """Bytes in one process; the parts are not all at their highest at one time, so the sum is an upper bound."""

    weights: int
    """This process's slice of the float32 master weights."""
    gradients: int
    """Its slice of the gradients, float32."""
    optimizer: int
    """Its slice of AdamW's two float32 means."""
    gathered: int
    """Whole parameters of the blocks under way in the type of the computation, and their gradients on the way to the slices."""
    activations: int
    """What the backward pass of one micro-batch needs of its forward pass, and the gradient of the largest of it."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def plan_memory(
    model: nn.Module,
    blocks: list[nn.Module],
    objective: Objective,
    batch: Batch,
    *,
    num_workers: int,
    dtype: torch.dtype,
    recompute: Recompute,
) -> Memory:
    """Of a model and a micro-batch on the meta device, fully sharded over `num_workers`; the model's type is changed."""
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    root = whole - sum(p.numel() for block in blocks for p in block.parameters())
    size = dtype.itemsize
    slices = -(-whole // num_workers), -(-trained // num_workers)
    return Memory(
        weights=_FP32 * slices[0],
        gradients=_FP32 * slices[1],
        optimizer=2 * _FP32 * slices[1],
        # Whole in memory: what is outside the blocks all the time, a block and the next one; the gradient of what is outside
        # and of a block; and what of it is being gathered or reduced.
        gathered=size * (2 * root + 3 * largest) + _FP32 * max(root, largest),
        activations=activation_bytes(model.to(dtype), blocks, objective, batch, recompute),
    )


def activation_bytes(
    model: nn.Module, blocks: list[nn.Module], objective: Objective, batch: Batch, recompute: Recompute
) -> int:
    """Bytes kept for the backward pass of this batch, and for the gradient of the largest tensor of it."""
    kept = _Kept({parameter.untyped_storage()._cdata for parameter in model.parameters()})
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(kept.enter).remove)
            stack.callback(block.register_forward_hook(kept.leave).remove)
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(kept.add_product).remove)
        stack.enter_context(saved_tensors_hooks(kept.keep, lambda tensor: tensor))
        stack.enter_context(_FusedAttention(kept))
        objective(model, batch)
    largest = max(kept.sizes)
    at_loss = kept.outside + 2 * largest  # the gradient of the loss, and the same in the type before it
    if recompute == "none":
        return at_loss + sum(kept.inside)
    all_along = len(kept.inside) * kept.block_input + (kept.products if recompute == "selective" else 0)
    # What the loss kept is gone when the last block is computed again.
    return all_along + max(at_loss, kept.outside - largest + max(kept.inside))


class _Kept:
    """Adds up what autograd keeps, block by block; a storage counts once, and a parameter not at all."""

    def __init__(self, parameters: set[int]) -> None:
        self.inside: list[int] = []
        self.outside = 0
        self.block_input = self.products = 0
        self.sizes: list[int] = []
        self._known = parameters
        self._is_inside = False

    def enter(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._is_inside = True
        self.inside.append(0)
        self.block_input = max(self.block_input, arguments[0].numel() * arguments[0].element_size())

    def leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._is_inside = False

    def add_product(self, module: nn.Module | None, arguments: Any, output: Tensor) -> None:
        """Count a result that selective recomputation does not compute again."""
        self.products += output.numel() * output.element_size()

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)  # autograd holds it, so that no other takes its place
            self.sizes.append(storage.nbytes())
            if self._is_inside:
                self.inside[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor


class _FusedAttention(TorchFunctionMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            out = _FusedKernel.apply(*arguments[:3])  # type: ignore[no-untyped-call]
            self._kept.add_product(None, arguments, out)
            return out
        return function(*arguments, **(options or {}))


class _FusedKernel(torch.autograd.Function):
    """The shapes that a fused kernel gives and keeps, and no numbers."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        context.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
