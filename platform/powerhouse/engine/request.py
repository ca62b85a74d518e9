"""A request from the prompt to its last token: what the engine knows of it, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from powerhouse.engine.constraint import Matcher
from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.kv_cache import BlockNames
from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end token or string, or the end of a constraint. abort: asked for, or the constraint's library gave up."""


@dataclass(frozen=True)
class Output:
    """What one step added to one answer; the last one of an answer has a finish reason."""

    request_id: str
    token_ids: tuple[int, ...]
    """New ones; an end-of-text token is among them."""
    text: str
    """New text: never half a character, never beyond a stop string. It may lag behind the tokens."""
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    """All so far."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of token_ids, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One for each token of the prompt, if asked for, in the first output alone; only a soft prompt foretells the first."""
    index: int = 0
    """Which of the request's n answers."""
    is_last: bool = False
    """Whether all answers have ended."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the cache."""


class Request:
    """The engine's record of one answer to a prompt.

    Prompt and output are one list of tokens. The first `num_computed` have their keys and values in `blocks`, the next
    `num_in_flight` are in batches on their way, and what is missing is `num_missing`: the whole prompt at first, less what
    the prefix cache has; one token when decoding; everything again after a pre-emption. The scheduler needs no other notion
    of phases. Where the next token is computed before it is known here, one more is in flight than there are tokens.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        text: TextStream,
        *,
        index: int = 0,
        rank: tuple[int, int] = (0, 0),
        names: BlockNames | None = None,
        leader: Request | None = None,
        end_ids: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
        adapter: int = 0,
        num_soft: int = 0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.text = text
        self.rank = rank
        """Priority and arrival: the smaller goes first."""
        self.names = names
        """Of its blocks in the prefix cache; None takes no part in it."""
        self.leader = leader
        """The first answer to the same prompt, whose blocks this one shares once they are computed."""
        self.end_ids = end_ids
        """Tokens that end it."""
        self.matcher = matcher
        """Of its constraint."""
        self.adapter = adapter
        self.num_soft = num_soft
        """Tokens of a soft prompt, with which the prompt begins."""
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.draft: list[int] = []
        """Guesses of what comes next, which are computed with the text."""
        self.num_computed = 0
        self.num_in_flight = 0
        self.num_cached = 0
        self.num_named = 0
        """Of its blocks, those that the prefix cache knows."""
        self.blocks: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * max(num_soft + params.prompt_logprobs_from, 1)
        """Of the tokens so far; None of those that are not asked for, and of the first, which nothing foretells."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_planned(self) -> int:
        """Computed or in flight."""
        return self.num_computed + self.num_in_flight

    @property
    def num_missing(self) -> int:
        return self.num_tokens - self.num_planned

    @property
    def is_in_flight(self) -> bool:
        return self.num_in_flight > 0

    @property
    def is_foreseeable(self) -> bool:
        """Whether all that is to be known of the token after the next is the next, which is being chosen."""
        if self.num_missing or not self.is_in_flight or self.matcher or self.params.has_penalties:
            return False
        return self.num_output_tokens + 1 < self.params.max_tokens

    @property
    def is_held_back(self) -> bool:
        """Whether it waits for its leader to compute the prompt for both."""
        leader = self.leader
        return leader is not None and leader.finish_reason is None and leader.num_computed < self.num_prompt_tokens

    @property
    def reusable_names(self) -> list[bytes]:
        """Of the blocks that need not be computed if the cache has them: the token before one to be told always is."""
        is_scored = self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens
        return self._names_within((len(self.prompt_logprobs) if is_scored else self.num_tokens) - 1)

    @property
    def computed_names(self) -> list[bytes]:
        """Of the full blocks whose tokens are known: that after which an abort came, computed ahead, never is."""
        return self._names_within(min(self.num_computed, self.num_tokens))

    @property
    def num_to_compute(self) -> int:
        return self.num_missing + len(self.draft)

    def _names_within(self, num_tokens: int) -> list[bytes]:
        return self.names.first(num_tokens // self.names.block_size, self.token_ids) if self.names else []
