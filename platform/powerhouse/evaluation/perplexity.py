"""Bits per byte of held-out documents: under a model, under token frequencies, and under xz.

bits per byte = nats / ln 2 / bytes. Unlike perplexity it compares models of different tokenizers. Shapes: W windows, T
positions in a window, V vocabulary.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from powerhouse.evaluation.score import Sums
from powerhouse.models.decoder import Decoder

_IGNORED = -100


@dataclass(frozen=True)
class Windows:
    """Documents cut into rows of at most the context's length."""

    inputs_WT: Tensor
    labels_WT: Tensor
    """-100 after a document's end."""
    owner_W: Tensor
    """Number of the document that a window is of."""


def cut_into_windows(documents: Sequence[Sequence[int]], context: int, end_of_text_id: int) -> Windows:
    """Each document's tokens are labels exactly once; the first is predicted from the end-of-text token alone."""
    inputs, labels, owners = [], [], []
    for number, ids in enumerate(documents):
        before = [end_of_text_id, *ids]
        for start in range(0, len(ids), context):
            inputs.append(_pad(before[start : start + context][: len(ids) - start], context, end_of_text_id))
            labels.append(_pad(ids[start : start + context], context, _IGNORED))
            owners.append(number)
    shape = (len(owners), context)
    return Windows(torch.tensor(inputs).reshape(shape), torch.tensor(labels).reshape(shape), torch.tensor(owners).long())


def _pad(ids: Sequence[int], length: int, filler: int) -> list[int]:
    return [*ids, *[filler] * (length - len(ids))]


@torch.inference_mode()
def nats_of_documents(
    model: Decoder, documents: Sequence[Sequence[int]], end_of_text_id: int, batch_windows: int
) -> list[float]:
    """-ln p(document) of each, in disjoint windows of the model's context."""
    device = next(model.parameters()).device
    windows = cut_into_windows(documents, model.config.max_position_embeddings, end_of_text_id)
    nats = torch.zeros(len(documents), dtype=torch.float64)
    for start in range(0, len(windows.owner_W), batch_windows):
        part = slice(start, start + batch_windows)
        nats_W = nats_of_windows(model, windows.inputs_WT[part].to(device), windows.labels_WT[part].to(device))
        nats.index_add_(0, windows.owner_W[part], nats_W.cpu())
    return [float(value) for value in nats]


def nats_of_windows(model: Decoder, inputs_WT: Tensor, labels_WT: Tensor) -> Tensor:
    logits_WTV = model(inputs_WT, torch.arange(inputs_WT.shape[1], device=inputs_WT.device))
    losses = F.cross_entropy(logits_WTV.flatten(0, 1), labels_WT.flatten(), ignore_index=_IGNORED, reduction="none")
    return losses.view_as(labels_WT).double().sum(dim=1)


def unigram_nats(counts_V: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """-ln p(token) with p = (count + 1) / (total + V) (Laplace 1814)."""
    costs: npt.NDArray[np.float64] = np.log(counts_V.sum() + len(counts_V)) - np.log(counts_V + 1)
    return costs


def bits_per_byte(sums: Sums) -> float:
    """Of (nats, bytes)."""
    return float(sums[0] / math.log(2) / sums[1])


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Of all texts, one after the other, in one `xz -9` stream."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
