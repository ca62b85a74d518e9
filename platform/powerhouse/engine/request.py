"""A request from the prompt to its last token: what the user asks for, what the engine knows of it, what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.logprobs import MAX_NUM_TOP, TokenLogprobs
from powerhouse.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to end.

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """

    max_tokens: int = 16
    """Most new tokens; 0 only reads the prompt, for its logprobs."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens; None is all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability, after top_k."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is computed beside; None draws one for the request."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    logprobs: int | None = None
    """Tell each new token's logprob, and that many of the likeliest in its place; None tells nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        allowed = "a whole number above 0" if least else "a whole number, 0 or above"
        _check("max_tokens", self.max_tokens, allowed, _is_int(self.max_tokens) and self.max_tokens >= least)
        _check("temperature", self.temperature, "0 or above", _is_number(self.temperature) and self.temperature >= 0)
        _check("top_p", self.top_p, "above 0, up to 1", _is_number(self.top_p) and 0 < self.top_p <= 1)
        _check("top_k", self.top_k, "1 or above, or None", self.top_k is None or (_is_int(self.top_k) and self.top_k > 0))
        _check("seed", self.seed, "0 or above, or None", self.seed is None or (_is_int(self.seed) and self.seed >= 0))
        is_stop = isinstance(self.stop, tuple) and all(isinstance(item, str) and item for item in self.stop)
        _check("stop", self.stop, "a tuple of non-empty strings", is_stop)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            is_number = value is None or (_is_int(value) and 0 <= value <= MAX_NUM_TOP)
            _check(name, value, f"0 to {MAX_NUM_TOP}, or None", is_number)
        _check("ignore_eos", self.ignore_eos, "true or false", isinstance(self.ignore_eos, bool))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise RequestError(f"{name} is out of range", got=repr(value), allowed=allowed)


@dataclass(frozen=True)
class Output:
    """What one step added to one request; the last one of a request has a finish reason."""

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
    """One for each token of the prompt, if asked for, in the first output alone; nothing foretells the first token."""


class Request:
    """The engine's record of one request.

    Prompt and output are one list of tokens. The first `num_computed` have their keys and values in `blocks`, the next
    `num_in_flight` are in a batch on its way, and what is missing is `num_missing`: the whole prompt at first, one token
    when decoding, everything again after a pre-emption. The scheduler needs no other notion of phases.
    """

    def __init__(self, request_id: str, prompt: Sequence[int], params: SamplingParams, seed: int, text: TextStream) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.text = text
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.num_computed = 0
        self.num_in_flight = 0
        self.blocks: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        """Of the tokens so far that were computed with it."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_missing(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_in_flight(self) -> bool:
        return self.num_in_flight > 0
