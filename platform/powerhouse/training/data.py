"""Which rows a step learns from: a pure function of (number of rows, seed, step), whatever the number of workers.

Shapes: B rows, R tokens in a row, T = R - 1 predictions. The run reads one endless stream: every epoch is a permutation of all
rows, drawn from (seed, epoch). Step k of the run is the stream's places [k * B, (k + 1) * B), and rank r of n ranks has the
r-th of n equal slices of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from powerhouse.corpora.shards import TokenRows
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.adapting import adapt_batch
from powerhouse.training.batches import PackedRows
from powerhouse.training.config import TrainingConfig
from powerhouse.training.methods import method_of
from powerhouse.training.objectives import Batch
from powerhouse.training.rows import rows_folder

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowOrder:
    """The stream over `num_rows` rows."""

    num_rows: int
    seed: int

    def rows_at(self, places: Indices) -> Indices:
        """Numbers of the rows that stand at these places of the stream."""
        epochs, offsets = np.divmod(places, self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            is_here = epochs == epoch
            rows[is_here] = _permutation(self.num_rows, self.seed, int(epoch))[offsets[is_here]]
        return rows


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def _permutation(num_rows: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def places_of(step: int, rank: int, num_ranks: int, global_batch_rows: int) -> Indices:
    """Places of the stream that a rank reads in a step."""
    num_here = global_batch_rows // num_ranks
    start = step * global_batch_rows + rank * num_here
    return np.arange(start, start + num_here)


def masks_documents(config: TrainingConfig, *, tells_learned: bool) -> bool:
    """Whether documents are kept apart: as the config says, or else where rows tell which tokens are learned."""
    return tells_learned if config.masks_documents is None else config.masks_documents


@dataclass(frozen=True)
class RowReader:
    """Reads rows by their places in the stream, straight from the memory-mapped shards."""

    rows: TokenRows
    order: RowOrder
    masks_documents: bool

    @classmethod
    def open(cls, config: TrainingConfig) -> RowReader:
        rows = TokenRows(rows_folder(config))
        return cls(rows, RowOrder(len(rows), config.seed), masks_documents(config, tells_learned=rows.tells_learned))

    def read(self, places_B: Indices) -> PackedRows:
        """The rows at these places, with what the run wants to know of them.

        Raises:
            InputError: documents are to be kept apart, and the shards do not tell where they start.
        """
        numbers_B = self.order.rows_at(places_B)
        documents_BR = self.rows.take_documents(numbers_B) if self.masks_documents else None
        learned_BR = self.rows.take_learned(numbers_B) if self.rows.tells_learned else None
        return PackedRows(self.rows.take(numbers_B), places_B, documents_BR, learned_BR)


class BatchMaker:
    """Makes of rows what the run's method gives to its objective, and the run's adapter with it."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._config = config
        self._tokenizer = Tokenizer.load(config.tokens)
        self._device = device

    def __call__(self, rows: PackedRows) -> Batch:
        noise = self._config.make_noise(self._tokenizer, rows.tokens_BR.shape[1])
        method = method_of(self._config.shape)
        batch = method.batch(rows.tokens_BR, rows.places_B, noise, self._device, rows.documents_BR, rows.learned_BR)
        return adapt_batch(self._config, batch, rows.places_B)


def read_batches(config: TrainingConfig, start_step: int, rank: int, num_ranks: int, device: torch.device) -> Iterator[Batch]:
    """A rank's rows of each step from `start_step` on."""
    reader, make_batch = RowReader.open(config), BatchMaker(config, device)
    for step in range(start_step, config.num_steps):
        yield make_batch(reader.read(places_of(step, rank, num_ranks, config.global_batch_rows)))
