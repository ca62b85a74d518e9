"""What a method teaches: `(model, batch) -> (loss_sum, num_valid_tokens)`, both scalars of this rank's micro-batch.

Shapes: B rows, S source positions, T positions, V vocabulary. The loop divides by the count over all ranks and
micro-batches, so that the gradient is that of the mean over the global batch however it was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from powerhouse.models.attention import Attend, Mask, RowAttention, document_positions
from powerhouse.models.kernels import causal_attention, document_kernel
from powerhouse.models.model import token_loss
from powerhouse.training.noise import IGNORED

Batch = Mapping[str, Tensor]
"""Tensors whose first axis is the row."""

Objective = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def causal_language_model(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `inputs_BT` up to each."""
    return _loss(model(batch["inputs"], *_positions(batch)), batch["labels"])


def masked_language_model(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the hidden `labels_BT` given all `inputs_BT`."""
    return _loss(model(batch["inputs"], documents_BT=batch.get("documents")), batch["labels"])


def sequence_to_sequence(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `sources_BS` and the `inputs_BT` up to each."""
    documents_BS, documents_BT = batch.get("source_documents"), batch.get("documents")
    memory = model.remember(batch["sources"], documents_BS=documents_BS, target_documents_BT=documents_BT)
    positions, attend = _positions(batch)
    return _loss(model(batch["inputs"], positions, memory, attend), batch["labels"])


def _positions(batch: Batch) -> tuple[Tensor, Attend]:
    """Positions and attention of a row, or of the documents in it, each from its own start: what it would be alone."""
    inputs_BT, documents_BT = batch["inputs"], batch.get("documents")
    if documents_BT is None:
        return torch.arange(inputs_BT.shape[1], device=inputs_BT.device), causal_attention
    return document_positions(documents_BT), RowAttention(Mask(document_BS=documents_BT), document_kernel(documents_BT.device))


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    return token_loss(logits_BTV, labels_BT), (labels_BT != IGNORED).sum()
