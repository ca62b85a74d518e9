"""From a prompt and an answer to token ids: one rule by which every family finds the answer's tokens.

The answer's tokens are those that the whole text has after the tokens of what stands before the slot, blanks at the slot's
edge counted to the answer: a tokenizer of words and blanks has ' positive' as one token, and 'Sentiment: ' as a rare one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from powerhouse.errors import InputError
from powerhouse.prompting.template import Prompt

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Texts to ids, without special tokens."""


class SlotRow(NamedTuple):
    """The ids of a prompt with an answer in its slot."""

    before: list[int]
    answer: list[int]
    after: list[int]


def slot_row(encode: Encode, prompt: Prompt, answer: str) -> SlotRow:
    """Cut the ids at the answer's edges.

    Raises:
        InputError: the answer is empty, or the tokenizer merges it with what stands beside it, or not in one way.
    """
    before = prompt.before.rstrip()
    answer = prompt.before[len(before) :] + answer
    context, with_answer, whole = encode([before, before + answer, before + answer + prompt.after])
    cut, end = len(context), len(with_answer)
    if not answer.strip():
        raise InputError("an empty answer", got=repr(answer), do="give each answer a word")
    if end == cut or with_answer[:cut] != context or whole[:end] != with_answer:
        raise InputError(
            "the tokenizer merges an answer with the text beside it",
            got=f"{(before + answer + prompt.after)[-80:]!r}",
            do="put a blank or a line break between the slot and its neighbours",
        )
    return SlotRow(context, with_answer[cut:], whole[end:])
