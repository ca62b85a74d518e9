"""What is done to a model's blocks before they are sharded: recomputation, then compilation. Names stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from powerhouse.models.halving import HALVED_ATTENTION
from powerhouse.training.sharding import blocks_of

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    HALVED_ATTENTION,
}
"""What costs most to compute again: matrix products and fused attention (Korthikanti et al. 2022, section 5, keeps these and
computes the cheap rest again). Not bmm: it makes scores of attention, which are large, and which our kernels then change."""


def recompute_blocks(model: nn.Module, what: Literal["selective", "full"]) -> None:
    """Keep each block's input for the backward pass, with `selective` also what costs most, and compute the rest again."""
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if what == "selective" else {}
    )
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def _policy(context: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block: alike blocks share their code, so the first step takes the time of one."""
    for block in blocks_of(model):
        block.compile()
