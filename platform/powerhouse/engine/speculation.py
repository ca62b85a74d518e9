"""Tokens guessed ahead, to be checked together in one pass of the model (Leviathan et al. 2023; Chen et al. 2023).

The model draws a token at every guessed place exactly as it would without guesses, with the same random number, and a guess
counts while it is what was drawn. That is rejection sampling from a proposal with all its weight on one token: a guess d is
accepted with the model's probability p(d), and what comes in its place is distributed as p without d. So an answer is not only
distributed as without speculation, it is the same. A draft model guesses with the same random numbers, which makes two
distributions that are alike agree often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from powerhouse.engine.adapters import AdapterTable
from powerhouse.engine.batch import ForwardBatch, make_batch
from powerhouse.engine.request import Request
from powerhouse.engine.rows import row_sampling
from powerhouse.engine.scheduler import Schedule
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer


class Speculator(Protocol):
    """Fills requests' `draft`."""

    def plan(self, running: Iterable[Request]) -> None:
        """Before requests are scheduled: say how many tokens to make room for."""

    def fill(self, scheduled: Schedule) -> None:
        """After that, when it is known how many there is room for: guess them."""


class PromptLookup:
    """Guesses that the text goes on as it did the last time that its last tokens came (Saxena 2023)."""

    def __init__(self, num_tokens: int, ngram: int) -> None:
        self._num_tokens = num_tokens
        self._ngram = ngram
        self._places: WeakKeyDictionary[Request, dict[tuple[int, ...], int]] = WeakKeyDictionary()
        """What comes after an n-gram: the place of the last time, for n-grams that have one."""
        self._num_read: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def plan(self, running: Iterable[Request]) -> None:
        for request in running:
            if num_tokens := _num_allowed(request, self._num_tokens):
                request.draft = self._guess(request, num_tokens)

    def fill(self, scheduled: Schedule) -> None:
        pass

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        ids, ngram = request.token_ids, self._ngram
        places = self._places.setdefault(request, {})
        for place in range(self._num_read.get(request, ngram), len(ids)):
            places[tuple(ids[place - ngram : place])] = place
        self._num_read[request] = max(len(ids), ngram)
        found = places.get(tuple(ids[-ngram:]))
        # What repeats at a distance shorter than the guess is long goes on repeating.
        return [] if found is None else [ids[found + i % (len(ids) - found)] for i in range(num_tokens)]


class DraftModel:
    """Guesses as a smaller model with the same vocabulary would write.

    Its keys and values lie in the blocks of the same numbers as the model's, in a cache of its own; so wherever a block is
    shared or found again, so is the draft model's part of it.
    """

    def __init__(self, stage: Stage, num_tokens: int, block_size: int) -> None:
        self._stage = stage
        self._num_tokens = num_tokens
        self._block_size = block_size

    def plan(self, running: Iterable[Request]) -> None:
        for request in running:
            if num_tokens := _num_allowed(request, self._num_tokens):
                request.draft = [0] * num_tokens

    def fill(self, scheduled: Schedule) -> None:
        plain = {request: num_tokens for request, num_tokens in scheduled.items() if not request.draft}
        if plain:
            self._stage.forward(make_batch(plain, self._block_size))
        guessing = [request for request in scheduled if request.draft]
        for i in range(max((len(request.draft) for request in guessing), default=-1) + 1):
            guessing = [request for request in guessing if len(request.draft) >= i]
            batch = self._one_token_each(guessing, i)
            hidden_TC = self._stage.forward(batch)
            for request, token_id in zip(guessing, self._stage.sample(batch, hidden_TC).token_ids, strict=True):
                if i < len(request.draft):
                    request.draft[i] = token_id

    def _one_token_each(self, requests: Sequence[Request], i: int) -> ForwardBatch:
        """The last token of the text (i = 0) or guess i - 1, to guess the next; after the last guess only for its keys."""
        size = self._block_size
        places = [request.num_computed + i for request in requests]
        return ForwardBatch(
            tuple((*request.token_ids, *request.draft)[place] for request, place in zip(requests, places, strict=True)),
            tuple(places),
            tuple(request.blocks[at // size] * size + at % size for request, at in zip(requests, places, strict=True)),
            (1,) * len(requests),
            tuple(tuple(request.blocks[: at // size + 1]) for request, at in zip(requests, places, strict=True)),
            tuple(range(len(requests))),
            tuple(row_sampling(request, request.draft[:i])._replace(num_logprobs=None) for request in requests),
        )


def make_speculator(model_config: DecoderConfig, tokenizer: Tokenizer, config: EngineConfig) -> Speculator | None:
    """Make what the settings ask for; a draft model is loaded into this process, in the settings' precision.

    Raises:
        ModelFormatError: the draft model is missing or damaged.
        ConfigError: it has another tokenizer, or a shorter context.
    """
    speculation = config.speculation
    if speculation is None or speculation.model is None:
        return PromptLookup(speculation.num_tokens, speculation.ngram) if speculation else None
    if AdapterTable(config.adapters, model_config.vocab_size).has_soft_prompts:
        raise ConfigError("speculation.model cannot read soft prompts", got=sorted(config.adapters), do="leave out one of them")
    path = Path(speculation.model)
    if Tokenizer.load(path).core.get_vocab() != tokenizer.core.get_vocab():
        raise ConfigError("speculation.model has another vocabulary", got=path, do="take a model of the same family")
    needed, context = config.max_model_len or model_config.max_position_embeddings, read_config(path).max_position_embeddings
    if context < needed:
        raise ConfigError("speculation.model has a shorter context", got=context, do=f"set max_model_len={context}")
    stage = Stage.load(path, config.model_copy(update={"num_stages": 1, "adapters": {}}))
    return DraftModel(stage, speculation.num_tokens, config.block_size)


def _num_allowed(request: Request, num_tokens: int) -> int:
    """Only after a text that is computed but for its last token, and never beyond the answer's last but one. A constraint's
    next tokens are known one at a time.
    """
    if request.is_in_flight or request.num_missing != 1 or request.matcher:
        return 0
    return min(num_tokens, request.params.max_tokens - request.num_output_tokens - 1)
