"""What a method teaches: `(model, batch) -> (loss_sum, num_valid_tokens)`, both scalars of this rank's micro-batch.

Shapes: B rows, T positions, V vocabulary. The loop divides by the count over all ranks and micro-batches, so that the
gradient is that of the mean over the global batch however it was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from powerhouse.models.model import token_loss

Batch = Mapping[str, Tensor]
"""Tensors whose first axis is the row."""

Objective = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

IGNORED = -100
"""The label that is not counted."""


def causal_language_model(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given `inputs_BT`."""
    inputs_BT, labels_BT = batch["inputs"], batch["labels"]
    logits_BTV = model(inputs_BT, torch.arange(inputs_BT.shape[1], device=inputs_BT.device))
    return token_loss(logits_BTV, labels_BT), (labels_BT != IGNORED).sum()
