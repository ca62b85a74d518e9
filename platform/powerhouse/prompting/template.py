"""Texts with named fields and one slot, `[MASK]`: the place where the model's answer belongs.

    Template("I felt [MASK] after the movie: {text}").fill({"text": "Two hours too long."})

One template serves every family: an encoder fills the slot, a decoder goes on from it, an encoder-decoder is asked for it by a
sentinel. What comes from data is never read as a field or as a slot.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from powerhouse.errors import InputError

SLOT = "[MASK]"


@dataclass(frozen=True)
class Prompt:
    """A template with an item in it, cut at its slot."""

    before: str
    """Text before the slot; in a chat, of the answer that has begun."""
    after: str = ""
    """Text after the slot."""
    turns: tuple[str, ...] = ()
    """Of a chat: what user and assistant have said by turns, the user first and last. Without any it is plain text."""

    @property
    def messages(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": text} for number, text in enumerate(self.turns)]

    def __str__(self) -> str:
        return "\n\n".join([*self.turns, f"{self.before}{SLOT}{self.after}"])


class Template:
    """`text` has the slot; a `user` text makes it a chat, in which `text` is the assistant's answer.

    Raises:
        InputError: there is no slot or more than one, no field, or a brace that is no field.
    """

    def __init__(self, text: str, user: str | None = None) -> None:
        if text.count(SLOT) != 1:
            raise InputError(
                "a template has one slot, where the answer belongs",
                got=text,
                allowed=f"{SLOT} once, as in 'Review: {{text}}\\nSentiment: {SLOT}'",
            )
        before, _, after = text.partition(SLOT)
        self.text, self.user = text, user
        self._before, self._after = _parse(before, text), _parse(after, text)
        self._user = None if user is None else _parse(user, user)
        self.fields = {name for parts in (self._before, self._after, self._user or []) for _, name in parts if name}
        if not self.fields:
            raise InputError("a template without a field asks every item the same", got=text, allowed="{name} of a column")

    def fill(self, item: Mapping[str, Any], examples: Sequence[tuple[Mapping[str, Any], str]] = ()) -> Prompt:
        """Put an item's columns in their places; before it stand `examples`, items with their answer in the slot.

        In plain text examples are a blank line apart; in a chat each is a turn of the user and one of the assistant.

        Raises:
            InputError: a column is missing.
        """
        before, after = _fill(self._before, item), _fill(self._after, item)
        shown = [(_fill(self._user or [], example), self._complete(example, answer)) for example, answer in examples]
        if self._user is not None:
            return Prompt(before, after, (*(turn for pair in shown for turn in pair), _fill(self._user, item)))
        return Prompt("".join(f"{text}\n\n" for _, text in shown) + before, after)

    def _complete(self, item: Mapping[str, Any], answer: str) -> str:
        return _fill(self._before, item) + answer + _fill(self._after, item)


def _parse(text: str, whole: str) -> list[tuple[str, str | None]]:
    """Cut into (literal, name of the field after it)."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError("a template with a brace that is no field", got=f"{whole} ({error})", do="write {{ for a {") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise InputError("a field is a column's name in braces", got=f"{{{name}}} in {whole}", allowed="{name}")
    return [(literal, name) for literal, name, _, _ in parts]


def _fill(parts: Sequence[tuple[str, str | None]], item: Mapping[str, Any]) -> str:
    return "".join(literal + ("" if name is None else _column(item, name)) for literal, name in parts)


def _column(item: Mapping[str, Any], name: str) -> str:
    if name not in item:
        raise InputError("the data has no such column", got=name, allowed=", ".join(map(str, item)))
    return str(item[name])
