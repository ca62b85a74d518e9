"""Answers of a given form: by a JSON schema, a regular expression, or a choice of texts.

The library llguidance tells, after every token, which tokens may come next. It is loaded with the first constraint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powerhouse.errors import RequestError
from powerhouse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


@dataclass(frozen=True)
class Constraint:
    """The form of an answer. It is checked when a request is submitted."""

    kind: str
    grammar: str
    """As llguidance reads it."""

    @classmethod
    def by_json_schema(cls, schema: Mapping[str, Any]) -> Constraint:
        """Only JSON that the schema allows, without blanks of choice; {"type": "object"} is any object."""
        from llguidance import LLMatcher

        options: Any = {"whitespace_flexible": False}
        return cls("JSON schema", LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))

    @classmethod
    def by_regex(cls, pattern: str) -> Constraint:
        """Only texts that the expression matches from end to end; in the syntax of Rust's `regex`."""
        from llguidance import LLMatcher

        return cls("regex", LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def by_choice(cls, texts: Sequence[str]) -> Constraint:
        """One of these texts.

        Raises:
            RequestError: there is none, or one is empty.
        """
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError("choice is out of range", got=texts, allowed="one text or more, none of them empty")
        return cls("choice", f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}")


class Constrainer:
    """Makes matchers for one model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokens: LLTokenizer | None = None

    def matcher(self, constraint: Constraint) -> Matcher:
        """Start an answer of this form.

        Raises:
            RequestError: the constraint is not valid, or cannot be kept to with this tokenizer.
        """
        from llguidance import LLMatcher, LLTokenizer

        if self._tokens is None:
            try:
                self._tokens = LLTokenizer(self._tokenizer.core.to_str(), self._vocab_size, self._tokenizer.end_of_text_id)
            except ValueError as error:
                raise RequestError("this model's tokenizer takes no constraints", got=error) from None
        if problem := LLMatcher.validate_grammar(constraint.grammar, self._tokens):
            raise RequestError(f"the {constraint.kind} is not valid", got=problem.strip())
        return Matcher(LLMatcher(self._tokens, constraint.grammar, log_level=0))


class Matcher:
    """One answer on its way."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> bytes:
        """Bit i of the bytes, lowest first: whether token i may come next."""
        return bytes(self._matcher.compute_bitmask())

    def take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can come."""
        return bool(self._matcher.is_stopped()) and not self.error

    @property
    def error(self) -> str:
        """Why the library gave up, such as a limit of its own; empty while all is well."""
        return str(self._matcher.get_error())
