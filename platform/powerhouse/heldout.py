"""Held-out documents, the windows they are scored in, and bits per byte.

bits per byte = nats / ln 2 / bytes. Unlike perplexity it compares models of different tokenizers. Shapes: W windows, T
positions in a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.errors import InputError

Amount = TypeVar("Amount", float, npt.NDArray[np.float64])

HELDOUT = "heldout"
"""Folder of a corpus artifact."""
_IGNORED = -100


def read_heldout(directory: Path) -> list[str]:
    """Texts of the held-out documents that are not empty.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    paths = sorted(directory.glob("*.parquet"))
    try:
        columns = [pq.read_table(path, columns=["text"]).column("text").to_pylist() for path in paths]
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{directory}: damaged held-out documents", got=error, do="run jobs/curate_corpus.py again") from None
    texts = [text for column in columns for text in column if text]
    if not texts:
        raise InputError(f"{directory}: no held-out documents", do="raise the held-out share of the corpus")
    return texts


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


def nats_of_windows(model: nn.Module, inputs_WT: Tensor, labels_WT: Tensor) -> Tensor:
    logits_WTV = model(inputs_WT, torch.arange(inputs_WT.shape[1], device=inputs_WT.device))
    losses = F.cross_entropy(logits_WTV.flatten(0, 1), labels_WT.flatten(), ignore_index=_IGNORED, reduction="none")
    return losses.view_as(labels_WT).double().sum(dim=1)


def bits_per_byte(nats: Amount, num_bytes: Amount) -> Amount:
    """Of one text, or of many at once."""
    return nats / math.log(2) / num_bytes
