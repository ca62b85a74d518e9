"""What a method teaches: `(model, batch) -> (loss_sum, num_valid_tokens)`, both scalars of this rank's micro-batch.

Shapes: B rows, S source positions, T positions, N tokens, C model width, V vocabulary. The loop divides by the count
over all ranks and micro-batches, so that the gradient is that of the mean over the global batch however it was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from powerhouse.models.attention import Attend, Mask, RowAttention, document_positions
from powerhouse.models.kernels import causal_attention, document_kernel
from powerhouse.models.model import Finish, token_loss
from powerhouse.training.noise import IGNORED

Batch = Mapping[str, Tensor]
"""Tensors whose first axis is the row."""

Objective = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def causal_language_model(model: Any, batch: Batch, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `inputs_BT` up to each."""
    return model(batch["inputs"], *_positions(batch), finish=_loss(model, batch, chunk_tokens)), _num_valid(batch)


def masked_language_model(model: Any, batch: Batch, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the hidden `labels_BT` given all `inputs_BT`."""
    finish = _loss(model, batch, chunk_tokens)
    return model(batch["inputs"], documents_BT=batch.get("documents"), finish=finish), _num_valid(batch)


def sequence_to_sequence(model: Any, batch: Batch, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of `labels_BT` given the `sources_BS` and the `inputs_BT` up to each."""
    documents_BS, documents_BT = batch.get("source_documents"), batch.get("documents")
    memory = model.remember(batch["sources"], documents_BS=documents_BS, target_documents_BT=documents_BT)
    positions, attend = _positions(batch)
    return model(batch["inputs"], positions, memory, attend, finish=_loss(model, batch, chunk_tokens)), _num_valid(batch)


def _positions(batch: Batch) -> tuple[Tensor, Attend]:
    """Positions and attention of a row, or of the documents in it, each from its own start: what it would be alone."""
    inputs_BT, documents_BT = batch["inputs"], batch.get("documents")
    if documents_BT is None:
        return torch.arange(inputs_BT.shape[1], device=inputs_BT.device), causal_attention
    return document_positions(documents_BT), RowAttention(Mask(document_BS=documents_BT), document_kernel(documents_BT.device))


def _num_valid(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORED).sum()


def _loss(model: Any, batch: Batch, chunk_tokens: int | None) -> Finish:
    """The last hidden states' loss, summed inside `forward`, where a sharded model has its head's parameters at hand."""
    return partial(head_loss, model.project, labels_BT=batch["labels"], chunk_tokens=chunk_tokens)


def head_loss(project: Finish, states_BTC: Tensor, labels_BT: Tensor, chunk_tokens: int | None) -> Tensor:
    """Sum of the cross-entropy in nats; no more than `chunk_tokens` logits at a time, which the backward pass makes again."""
    if chunk_tokens is None:
        return token_loss(project(states_BTC), labels_BT)
    states, labels = (torch.split(x, chunk_tokens) for x in (states_BTC.flatten(0, 1), labels_BT.flatten()))
    losses = [
        checkpoint(_chunk_loss, project, states_NC, labels_N, use_reentrant=False, preserve_rng_state=False)
        for states_NC, labels_N in zip(states, labels, strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(project: Finish, states_NC: Tensor, labels_N: Tensor) -> Tensor:
    return token_loss(project(states_NC), labels_N)
