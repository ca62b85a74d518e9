"""Questions to a decoder, in tokens: an answer's probability is that of its tokens after the prompt's.

With text after the slot an answer counts with it: P(answer, rest | before) is P(answer | before, rest) up to a factor that all
answers share (Bayes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from powerhouse.errors import InputError
from powerhouse.evaluation.asking import Question, Reply, Writing
from powerhouse.prompting import Prompt, slot_row

Ids = list[int]


TokenScores = Sequence[tuple[float, bool]]


class Encoder(Protocol):
    """A tokenizer, here or behind an endpoint."""

    @property
    def start_of_text_ids(self) -> Ids:
        """What stands before a text in the model's training; it may be nothing."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by their part: eos_token, bos_token where there is one."""

    def id_of(self, name: str, /) -> int:
        """Id of a named special token."""

    def encode_batch(self, texts: Sequence[str], /) -> list[Ids]:
        """Ids without special tokens."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]], /, *, add_generation_prompt: bool) -> Ids:
        """Ids of a conversation, up to where the assistant's answer begins."""


class TokenModel(Protocol):
    """A decoder, wherever it is."""

    @property
    def tokenizer(self) -> Encoder: ...

    @property
    def max_length(self) -> int:
        """Most tokens of one row, those to be written included."""

    def score(self, rows: Sequence[Ids], starts: Sequence[int], /) -> list[list[tuple[float, bool]]]:
        """Of each row, for every token from its start (1 or later) on: its logprob after all before, and if it is likeliest."""

    def write(
        self, rows: Sequence[Ids], /, *, max_tokens: int, temperature: float, stop: tuple[str, ...], seed: int
    ) -> list[str]:
        """Continue each row."""


class DecoderRespondent:
    """Answers questions with a decoder."""

    def __init__(self, model: TokenModel) -> None:
        self._model = model

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Score all rows of all questions at once, and write each group of equal settings at once."""
        replies: dict[int, Reply] = {}
        scored = [(number, item) for number, item in enumerate(questions) if item.kind != "write"]
        parts = [self._parts(item) for _, item in scored]
        rows, starts = [row for part in parts for row, _ in part], [start for part in parts for _, start in part]
        scores = iter(self._model.score(rows, starts))
        for (number, item), part in zip(scored, parts, strict=True):
            of_rows = list(islice(scores, len(part)))
            replies[number] = _answers_reply(of_rows) if item.kind == "answers" else _reading_reply(of_rows)
        for writing in dict.fromkeys(item.writing for item in questions if item.kind == "write"):
            assert writing is not None, "a text is written in some way"
            numbers = [number for number, item in enumerate(questions) if item.kind == "write" and item.writing == writing]
            for number, text in zip(numbers, self._write([questions[n].prompt for n in numbers], writing), strict=True):
                replies[number] = {"text": text}
        return [replies[number] for number in range(len(questions))]

    def _parts(self, question: Question) -> list[tuple[Ids, int]]:
        """Rows to score, and the place in each from which on tokens count."""
        return list(self._answer_rows(question) if question.kind == "answers" else self._windows(question))

    def _answer_rows(self, question: Question) -> Iterator[tuple[Ids, int]]:
        prompt = question.prompt
        for answer in question.answers:
            before, inside, after = slot_row(self._model.tokenizer.encode_batch, prompt, answer)
            row = [*self._context(prompt, before), *inside, *after]
            self._check_length(row, 0, prompt)
            yield row, len(row) - len(inside) - len(after)

    def _windows(self, question: Question) -> Iterator[tuple[Ids, int]]:
        """Disjoint windows: each token counts once, and the first of a window comes after the one before it alone."""
        tokenizer = self._model.tokenizer
        ids = [*_start_ids(tokenizer)[-1:], *tokenizer.encode_batch([question.prompt.before])[0]]
        length = min(question.window or self._model.max_length, self._model.max_length)
        for start in range(0, len(ids) - 1, length - 1):
            yield ids[start : start + length], 1

    def _context(self, prompt: Prompt, before: Ids) -> Ids:
        tokenizer = self._model.tokenizer
        if prompt.turns:
            return [*tokenizer.encode_chat(prompt.messages, add_generation_prompt=True), *before]
        return [*tokenizer.start_of_text_ids, *before] or _start_ids(tokenizer)

    def _write(self, prompts: Sequence[Prompt], writing: Writing) -> list[str]:
        rows = []
        for prompt in prompts:
            if prompt.after.strip():
                raise InputError(
                    "a decoder writes at the end of a text", got=str(prompt)[-80:], do="end the template with its slot"
                )
            [before] = self._model.tokenizer.encode_batch([prompt.before.rstrip(" ")])
            rows.append(self._context(prompt, before))
            self._check_length(rows[-1], writing.max_tokens, prompt)
        return self._model.write(rows, **writing.model_dump())

    def _check_length(self, row: Ids, num_new: int, prompt: Prompt) -> None:
        if len(row) + num_new > self._model.max_length:
            raise InputError(
                "a prompt is too long for the model",
                got=f"{len(row)} tokens and {num_new} new: {str(prompt)[:60]!r}...",
                allowed=f"{self._model.max_length} in all",
                do="give fewer examples, or leave the item out",
            )


def _start_ids(tokenizer: Encoder) -> Ids:
    """What a text comes after that has nothing before it: as in lm-evaluation-harness the token that begins a text, if it has a
    name, though the model's own training may not have put it there, else the one that ends the text before.
    """
    name = "bos_token" if "bos_token" in tokenizer.special_tokens else "eos_token"
    return tokenizer.start_of_text_ids or [tokenizer.id_of(name)]


def _answers_reply(answers: Sequence[TokenScores]) -> Reply:
    return {
        "logprobs": [math.fsum(logprob for logprob, _ in tokens) for tokens in answers],
        "num_tokens": [len(tokens) for tokens in answers],
        "is_greedy": [all(is_likeliest for _, is_likeliest in tokens) for tokens in answers],
    }


def _reading_reply(windows: Sequence[TokenScores]) -> Reply:
    nats = -math.fsum(logprob for tokens in windows for logprob, _ in tokens)
    return {"nats": nats, "num_tokens": sum(map(len, windows))}
