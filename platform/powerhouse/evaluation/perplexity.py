"""Nats and bits per byte of held-out documents: under a model, under token frequencies, and under xz.

Shapes: W windows, V vocabulary.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from powerhouse.evaluation.score import Sums, Values
from powerhouse.heldout import bits_per_byte, cut_into_windows, nats_of_windows
from powerhouse.models.decoder import Decoder


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


def finalise_bits_per_byte(sums: Sums) -> Values:
    """Of sums [..., 2]: nats, bytes."""
    return bits_per_byte(sums[..., 0], sums[..., 1])


def unigram_nats(counts_V: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """-ln p(token) with p = (count + 1) / (total + V) (Laplace 1814)."""
    costs: npt.NDArray[np.float64] = np.log(counts_V.sum() + len(counts_V)) - np.log(counts_V + 1)
    return costs


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Of all texts, one after the other, in one `xz -9` stream."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
