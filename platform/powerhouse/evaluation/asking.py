"""What is asked of a model: how likely answers are, a text to write, a text to read. Plain values that travel as JSON.

A question's key is the hash of all that it says, so the same question is asked once, whoever asks and however often a run is
begun again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from pydantic import Field

from powerhouse.config import Config
from powerhouse.prompting import Prompt

Reply = dict[str, Any]
"""answers: `logprobs`, `num_tokens` and `is_greedy` of each answer. write: `text`. read: `nats` and `num_tokens`."""


class Writing(Config):
    """How a text is written."""

    max_tokens: int = Field(default=64, gt=0)
    """Longest text."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    seed: int = Field(default=0, ge=0)
    """Of the sampling."""


@dataclass(frozen=True)
class Question:
    """One thing that a model is asked."""

    kind: Literal["answers", "write", "read"]
    prompt: Prompt
    """With its slot for `answers`; up to its slot for `write`; `before` is the text for `read`."""
    answers: tuple[str, ...] = ()
    """What may stand in the slot."""
    writing: Writing | None = None
    window: int | None = None
    """Tokens that are read at a time; as many as the model can where left out."""

    @cached_property
    def text(self) -> str:
        """The question as JSON."""
        writing = self.writing and self.writing.model_dump(mode="json")
        return json.dumps([self.kind, dataclasses.astuple(self.prompt), self.answers, writing, self.window], ensure_ascii=False)

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()[:24]

    @classmethod
    def parse(cls, text: str) -> Question:
        kind, (before, after, turns), answers, writing, window = json.loads(text)
        prompt = Prompt(before, after, tuple(turns))
        return cls(kind, prompt, tuple(answers), writing and Writing.model_validate(writing), window)


class Respondent(Protocol):
    """Whoever answers: a model here, or one behind an endpoint."""

    def __call__(self, questions: Sequence[Question], /) -> list[Reply]:
        """Answer all, in their order.

        Raises:
            InputError: a question cannot be put to this model.
        """
