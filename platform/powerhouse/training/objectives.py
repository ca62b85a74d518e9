"""What a method teaches: `(model, batch) -> (loss_sum, num_valid_tokens)`, both scalars of this rank's micro-batch.

Shapes: B rows, S source positions, T positions, V vocabulary. The loop divides by the count over all ranks and
micro-batches, so that the gradient is that of the mean over the global batch however it was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from powerhouse.models.model import token_loss
from powerhouse.training.noise import IGNORED

Batch = Mapping[str, Tensor]
"""Tensors whose first axis is the row."""

Objective = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def causal_language_model(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `inputs_BT` up to each."""
    inputs_BT = batch["inputs"]
    return _loss(model(inputs_BT, torch.arange(inputs_BT.shape[1], device=inputs_BT.device)), batch["labels"])


def masked_language_model(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the hidden `labels_BT` given all `inputs_BT`."""
    return _loss(model(batch["inputs"]), batch["labels"])


def sequence_to_sequence(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `sources_BS` and the `inputs_BT` up to each."""
    inputs_BT = batch["inputs"]
    positions_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    return _loss(model(inputs_BT, positions_T, model.remember(batch["sources"])), batch["labels"])


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    return token_loss(logits_BTV, labels_BT), (labels_BT != IGNORED).sum()
