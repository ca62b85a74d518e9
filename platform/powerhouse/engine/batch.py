"""The plan of one step, flat: what every stage needs to compute it and nothing it would have to decide.

It crosses process borders, so it is numbers only and travels as msgpack; no pickle is ever read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from powerhouse.engine.logprobs import RowScoring, TokenLogprobs
from powerhouse.engine.request import Request
from powerhouse.engine.rows import row_sampling
from powerhouse.engine.sampler import RowSampling


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of several sequences, one after the other: T tokens, N sequences, B of which get a new token."""

    token_ids: tuple[int, ...]
    """[T]"""
    positions: tuple[int, ...]
    """[T] from 0 at each sequence's start."""
    slots: tuple[int, ...]
    """[T] where in the KV cache each token's key and value go: block x block size + offset."""
    query_lengths: tuple[int, ...]
    """[N] tokens of each sequence in this batch; they are the last of its context."""
    block_tables: tuple[tuple[int, ...], ...]
    """[N] the blocks of each sequence's context, in order."""
    sampled_rows: tuple[int, ...]
    """[B] the rows of T after which a token is chosen."""
    sampling: tuple[RowSampling, ...]
    """[B]"""
    scoring: tuple[RowScoring, ...] = ()
    """Tokens of prompts whose likelihood is asked for."""
    adapters: tuple[int, ...] = ()
    """[N] which of the engine's adapters each sequence has, from 1, 0 being none; empty where nobody has one."""
    awaited: tuple[tuple[int, int], ...] = ()
    """Tokens that were not known when this was planned: their places in T, and in the B of the batch that chooses them."""
    num_back: int = 0
    """That batch is the one so many before this one; 0 where nothing is awaited."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def told(self, token_ids: Sequence[int]) -> ForwardBatch:
        """Put in what is awaited, given the tokens [B] of the batch that chose it."""
        if not self.awaited:
            return self
        filled = list(self.token_ids)
        for place, row in self.awaited:
            filled[place] = token_ids[row]
        return dataclasses.replace(self, token_ids=tuple(filled))

    def to_bytes(self) -> bytes:
        packed: bytes = msgpack.packb([getattr(self, field.name) for field in dataclasses.fields(self)])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> ForwardBatch:
        batch = cls(*msgpack.unpackb(data, use_list=False))
        sampling = tuple(RowSampling.from_wire(row) for row in batch.sampling)
        return dataclasses.replace(batch, sampling=sampling, scoring=tuple(RowScoring(*row) for row in batch.scoring))


class BatchResult(NamedTuple):
    """What the last stage answers to a batch."""

    token_ids: list[int]
    """[B]"""
    logprobs: list[TokenLogprobs | None]
    """[B] None where they are not asked for."""
    scored: list[TokenLogprobs]
    """One for each of the batch's `scoring`."""

    @classmethod
    def from_wire(cls, value: Any) -> BatchResult:
        token_ids, logprobs, scored = value
        told = [item and TokenLogprobs.from_wire(item) for item in logprobs]
        return cls(token_ids, told, [TokenLogprobs.from_wire(item) for item in scored])


def make_batch(
    scheduled: Mapping[Request, int], block_size: int, chosen_rows: Mapping[Request, int] | None = None, num_back: int = 0
) -> ForwardBatch:
    """Lay out the scheduled tokens; a request whose last token is among them gets a new one, and one after each guess.

    Tokens beyond a request's text are awaited from row `chosen_rows[request]` of the batch `num_back` before.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables: list[tuple[int, ...]] = []
    rows: list[int] = []
    sampling: list[RowSampling] = []
    scoring: list[RowScoring] = []
    awaited: list[tuple[int, int]] = []
    for request, num_tokens in scheduled.items():
        start, stop = request.num_planned - num_tokens, request.num_planned
        scoring += _row_scoring(request, start, stop, len(token_ids) - start)
        num_unknown = max(stop - request.num_tokens - len(request.draft), 0)
        if num_unknown:
            assert chosen_rows is not None, "only what another batch chooses is awaited"
            awaited.append((len(token_ids), chosen_rows[request]))
        token_ids += [*request.token_ids[start:stop], *request.draft, *[0] * num_unknown]
        positions += range(start, stop)
        slots += (request.blocks[i // block_size] * block_size + i % block_size for i in range(start, stop))
        tables.append(tuple(request.blocks[: -(-stop // block_size)]))
        if will_sample(request, stop):
            num_guesses = len(request.draft)
            rows += range(len(token_ids) - 1 - num_guesses, len(token_ids))
            sampling += [row_sampling(request, request.draft[:i], num_unknown) for i in range(num_guesses + 1)]
    return ForwardBatch(
        tuple(token_ids),
        tuple(positions),
        tuple(slots),
        tuple(scheduled.values()),
        tuple(tables),
        tuple(rows),
        tuple(sampling),
        tuple(scoring),
        tuple(request.adapter for request in scheduled) if any(request.adapter for request in scheduled) else (),
        tuple(awaited),
        num_back if awaited else 0,
    )


def will_sample(request: Request, stop: int) -> bool:
    """Whether a batch whose part of the request ends before position `stop` chooses its next token."""
    return stop >= request.num_tokens and request.params.max_tokens > 0


def scored_places(request: Request, start: int, stop: int) -> range:
    """The prompt's tokens that are scored when the positions from `start` to before `stop` are computed."""
    if request.params.prompt_logprobs is None:
        return range(0)
    return range(max(len(request.prompt_logprobs), start + 1), min(stop + 1, request.num_prompt_tokens))


def _row_scoring(request: Request, start: int, stop: int, offset: int) -> list[RowScoring]:
    """The row of position i is `offset` + i; what is scored after it is token i + 1."""
    num_top = request.params.prompt_logprobs or 0
    places = scored_places(request, start, stop)
    return [RowScoring(offset + place - 1, request.token_ids[place], num_top) for place in places]
