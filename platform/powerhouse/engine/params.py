"""How an answer is written and when it ends: what a user asks of one request, under the names of OpenAI and vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from powerhouse.engine.constraint import Constraint
from powerhouse.engine.logprobs import MAX_NUM_TOP
from powerhouse.errors import RequestError

MAX_N = 128


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
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability, before top_k."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is computed beside; None draws one for the request."""
    n: int = 1
    """Answers to the one prompt, each with a seed of its own that follows from the request's."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    """End like the end-of-text token, whether or not that one is ignored."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    min_tokens: int = 0
    """No end, by token or by string, within this many new tokens."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of prompt and answer, and multiplies their negative ones."""
    presence_penalty: float = 0.0
    """Taken off the logits of the answer's tokens so far."""
    frequency_penalty: float = 0.0
    """Taken off the logits of the answer's tokens so far, once for each time that they are there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, before the penalties."""
    constraint: Constraint | None = None
    """The form of the answer."""
    logprobs: int | None = None
    """Tell each new token's logprob, and that many of the likeliest in its place; None tells nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    prompt_logprobs_from: int = 0
    """Place of the prompt's first token of which they are told; what comes before it may come from the prefix cache."""

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        _check_int(self, "max_tokens", least, allowed="a whole number above 0" if least else "a whole number, 0 or above")
        for name in ("top_k", "seed"):
            _check_int(self, name, 1 if name == "top_k" else 0, optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            _check_int(self, name, 0, MAX_NUM_TOP, optional=True)
        _check_int(self, "prompt_logprobs_from", 0)
        _check_int(self, "n", 1, MAX_N)
        _check_int(self, "min_tokens", 0, self.max_tokens, allowed=f"0 to max_tokens={self.max_tokens}")
        is_constraint = self.constraint is None or isinstance(self.constraint, Constraint)
        _check(self, "constraint", "a Constraint, or None", is_constraint)
        _check(
            self, "min_tokens", "0 with a constraint, which has an end of its own", not (self.constraint and self.min_tokens)
        )
        _check_number(self, "temperature", "0 or above", lambda value: value >= 0)
        _check_number(self, "top_p", "above 0, up to 1", lambda value: 0 < value <= 1)
        _check_number(self, "min_p", "0 to 1", lambda value: 0 <= value <= 1)
        _check_number(self, "repetition_penalty", "above 0", lambda value: value > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(self, name, "-2 to 2", lambda value: -2 <= value <= 2)
        _check(self, "stop", "a tuple of non-empty strings", _is_tuple(self.stop, lambda item: isinstance(item, str) and item))
        _check(self, "stop_token_ids", "a tuple of token ids", _is_tuple(self.stop_token_ids, _is_int))
        _check(self, "ignore_eos", "true or false", isinstance(self.ignore_eos, bool))
        is_bias = isinstance(self.logit_bias, Mapping) and all(
            _is_int(token) and _is_number(value) and -100 <= value <= 100 for token, value in self.logit_bias.items()
        )
        _check(self, "logit_bias", "token ids with numbers from -100 to 100", is_bias)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_tuple(value: Any, is_item: Any) -> bool:
    return isinstance(value, tuple) and all(is_item(item) for item in value)


def _check_int(
    params: SamplingParams,
    name: str,
    least: int,
    most: int | None = None,
    *,
    optional: bool = False,
    allowed: str | None = None,
) -> None:
    value = getattr(params, name)
    is_in_range = _is_int(value) and value >= least and (most is None or value <= most)
    span = f"{least} or above" if most is None else f"{least} to {most}"
    _check(params, name, allowed or span + (", or None" if optional else ""), is_in_range or (optional and value is None))


def _check_number(params: SamplingParams, name: str, allowed: str, is_in_range: Any) -> None:
    value = getattr(params, name)
    _check(params, name, allowed, _is_number(value) and is_in_range(value))


def _check(params: SamplingParams, name: str, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise RequestError(f"{name} is out of range", got=repr(getattr(params, name)), allowed=allowed)
