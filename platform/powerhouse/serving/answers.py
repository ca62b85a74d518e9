"""A request's outputs in OpenAI's shapes: whole, or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from powerhouse.engine import Output, TokenLogprobs
from powerhouse.engine.streaming import Stream
from powerhouse.errors import EngineError, QueueFullError
from powerhouse.serving.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatObject,
    Choice,
    Completion,
    ErrorBody,
    ErrorDetail,
    Logprobs,
    Usage,
    explain,
)
from powerhouse.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Answer:
    """One stream of the engine."""

    def __init__(self, stream: Stream, model_name: str, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.created = int(time.time())

    async def outputs(self) -> list[Output]:
        """All of them; a reader who goes away ends the request."""
        try:
            return [output async for output in self.stream.outputs()]
        finally:
            self.stream.close()

    async def events(self, wants_usage: bool) -> AsyncIterator[str]:
        """Yield a chunk for every output that has text or is the last; with `wants_usage` one more for the counts."""
        exclude = None if wants_usage else {"usage"}
        num_written = 0
        try:
            async for output in self.stream.outputs():
                num_written += len(output.token_ids)
                if output.text or output.finish_reason:
                    yield _event(self.chunk(output).model_dump_json(exclude=exclude))
            if wants_usage:
                yield _event(self.counts(Usage.of(output.num_prompt_tokens, num_written)).model_dump_json())
        except EngineError as error:  # the status line is gone: the error goes where the rest would have been
            yield _event(ErrorBody(error=describe(error)).model_dump_json())
        yield _event("[DONE]")

    def chunk(self, output: Output) -> BaseModel:
        """What a stream tells of one output."""
        raise NotImplementedError

    def counts(self, usage: Usage) -> BaseModel:
        """The chunk after all others."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    def __init__(self, stream: Stream, model_name: str, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        super().__init__(stream, model_name, tokenizer)
        self._wants_logprobs = wants_logprobs

    def chunk(self, output: Output) -> Completion:
        choice = Choice(
            index=output.index, text=output.text, finish_reason=output.finish_reason, logprobs=self.logprobs([output])
        )
        return self.completion([choice])

    def counts(self, usage: Usage) -> Completion:
        return self.completion([], usage)

    def choice(self, index: int, outputs: Sequence[Output], prompt: str | list[int] | None) -> Choice:
        """The whole answer; with `prompt` it begins with that."""
        text = "".join(output.text for output in outputs)
        if prompt is not None:
            text = (prompt if isinstance(prompt, str) else self._decode(prompt)) + text
        return Choice(index=index, text=text, finish_reason=outputs[-1].finish_reason, logprobs=self.logprobs(outputs, prompt))

    def logprobs(self, outputs: Sequence[Output], prompt: str | list[int] | None = None) -> Logprobs | None:
        """Of the tokens of the outputs, behind those of the prompt if it is echoed; None where they were not asked for."""
        if not self._wants_logprobs:
            return None
        new = [token for output in outputs for token in output.logprobs or ()]
        first: list[TokenLogprobs | None] = list(outputs[0].prompt_logprobs or ()) if prompt is not None else []
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt or ())
        scored = [*first, *new]
        names = [self._name(token_id) for token_id in [*ids, *(token.token_id for token in new)]]
        return Logprobs(
            tokens=names,
            token_logprobs=[token and token.logprob for token in scored],
            top_logprobs=[token and self._top(token) for token in scored],
            text_offset=[0, *accumulate(map(len, names))][:-1],
        )

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself. Of two that are spelled alike the likelier one is told."""
        found: dict[str, float] = {}
        for token_id, logprob in [*token.top, (token.token_id, token.logprob)]:
            found.setdefault(self._name(token_id), logprob)
        return found

    def _name(self, token_id: int) -> str:
        """The token's text; where that is no whole character, its name in the vocabulary."""
        text = self._decode([token_id])
        return str(self.tokenizer.core.id_to_token(token_id)) if _REPLACEMENT in text else text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.core.decode(list(ids), skip_special_tokens=False))

    def completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.stream.request_id, created=self.created, model=self.model_name, choices=choices, usage=usage)


async def whole_completion(answers: Sequence[CompletionAnswer], prompts: Sequence[str | list[int]] | None) -> Completion:
    """One answer of several prompts, in their order; `prompts` are echoed."""
    outputs = []
    try:
        for answer in answers:
            outputs.append(await answer.outputs())  # noqa: PERF401 - the rest is closed if one of them ends early
    finally:
        for answer in answers:
            answer.stream.close()
    echoed: Sequence[str | list[int] | None] = prompts or [None] * len(answers)
    choices: list[Choice] = []
    for answer, of_prompt, prompt in zip(answers, outputs, echoed, strict=True):
        choices += [answer.choice(len(choices) + i, own, prompt) for i, own in enumerate(_by_index(of_prompt))]
    return answers[0].completion(choices, usage_of(outputs))


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    async def whole(self) -> ChatCompletion:
        outputs = await self.outputs()
        choices = []
        for index, own in enumerate(_by_index(outputs)):
            message = ChatMessage(content="".join(output.text for output in own))
            choices.append(ChatChoice(index=index, message=message, finish_reason=own[-1].finish_reason))
        return self._completion("chat.completion", choices, usage_of([outputs]))

    def chunk(self, output: Output) -> ChatCompletion:
        delta = ChatMessage(content=output.text)
        choice = ChatChoice(index=output.index, delta=delta, finish_reason=output.finish_reason)
        return self._completion("chat.completion.chunk", [choice])

    def counts(self, usage: Usage) -> ChatCompletion:
        return self._completion("chat.completion.chunk", [], usage)

    def _completion(self, kind: ChatObject, choices: list[ChatChoice], usage: Usage | None = None) -> ChatCompletion:
        name = self.stream.request_id.replace("cmpl-", "chatcmpl-")
        return ChatCompletion(id=name, object=kind, created=self.created, model=self.model_name, choices=choices, usage=usage)


def describe(error: Exception) -> ErrorDetail:
    """What OpenAI's error body says of an error."""
    if isinstance(error, RequestValidationError):
        return explain(error.errors())
    if isinstance(error, QueueFullError):
        return ErrorDetail(message=str(error), type="rate_limit_error", code="queue_full")
    if isinstance(error, EngineError):
        return ErrorDetail(message=str(error), type="server_error", code="engine_stopped")
    return ErrorDetail(message=str(error), type="invalid_request_error")


def usage_of(outputs_by_prompt: Sequence[Sequence[Output]]) -> Usage:
    """Tokens of all prompts and all answers of a request."""
    num_prompt = sum(outputs[-1].num_prompt_tokens for outputs in outputs_by_prompt)
    return Usage.of(num_prompt, sum(len(output.token_ids) for outputs in outputs_by_prompt for output in outputs))


def _by_index(outputs: Sequence[Output]) -> list[list[Output]]:
    """The outputs of each of the answers to one prompt."""
    last = max(output.index for output in outputs)
    return [[output for output in outputs if output.index == index] for index in range(last + 1)]


def _event(data: str) -> str:
    return f"data: {data}\n\n"
