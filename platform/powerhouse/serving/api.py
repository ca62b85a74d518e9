"""The HTTP routes over one engine: POST /v1/completions and /v1/chat/completions (whole or as server-sent events), GET
/v1/models, GET /health, and as vLLM has them POST /tokenize, POST /detokenize, GET /tokenizer_info.

A request names the model or one of the engine's adapters, as vLLM has it; `priority` orders what waits, the smallest first.
With `echo` and `logprobs` of token ids, completions are what lm-evaluation-harness judges a model by (`local-completions`).

Errors: 400 a request that can never be served, 404 another model, 429 too many waiting, 503 the engine has stopped; each
with OpenAI's error body. A stream that fails midway ends with an event that holds the error body.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from powerhouse.engine import SamplingParams
from powerhouse.engine.streaming import EngineLoop, Stream
from powerhouse.errors import EngineError, InputError, QueueFullError, RequestError
from powerhouse.serving.answers import ChatAnswer, CompletionAnswer, describe, whole_completion
from powerhouse.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    ErrorDetail,
    ModelCard,
    ModelList,
    TokenizeRequest,
)

RETRY_AFTER_S = 1


def make_api(engine_loop: EngineLoop, model_name: str) -> FastAPI:
    """Make the routes of one replica."""
    api = FastAPI(title="Powerhouse", description=f"Serves {model_name}.")
    routes = _Routes(engine_loop, model_name)
    api.add_api_route("/v1/completions", routes.complete, methods=["POST"], response_model=None)
    api.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    api.add_api_route("/v1/models", routes.list_models)
    api.add_api_route("/health", routes.health)
    api.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    api.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    api.add_api_route("/tokenizer_info", routes.describe_tokenizer)
    for error_class in (RequestValidationError, RequestError, InputError, EngineError):
        api.add_exception_handler(error_class, _answer_error)
    return api


class _Routes:
    def __init__(self, engine_loop: EngineLoop, model_name: str) -> None:
        self._engine_loop = engine_loop
        self._tokenizer = engine_loop.tokenizer
        self._model_name = model_name
        self._served: dict[str, str | None] = {model_name: None, **{name: name for name in engine_loop.adapters}}
        """What a request may give as its model, and the adapter that this is."""
        self._created = int(time.time())

    async def complete(self, request: CompletionRequest) -> Response:
        if request.model not in self._served:
            return self._refuse_model(request.model)
        streams = await self._submit_all(request)
        wants_logprobs = request.logprobs is not None
        answers = [CompletionAnswer(stream, request.model, self._tokenizer, wants_logprobs) for stream in streams]
        if request.stream:
            return EventStreamResponse(streams[0], answers[0].events(request.wants_usage_chunk))
        whole = await whole_completion(answers, request.prompts if request.echo else None)
        return JSONResponse(whole.model_dump())

    async def _submit_all(self, request: CompletionRequest) -> list[Stream]:
        """All prompts of a request, or none."""
        streams: list[Stream] = []
        params = request.sampling_params
        try:
            for prompt in request.prompts:
                streams.append(await self._submit(prompt, params, request))  # noqa: PERF401 - a list that may end early
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def _submit(
        self, prompt: str | list[int], params: SamplingParams, request: CompletionRequest | ChatRequest
    ) -> Stream:
        return await self._engine_loop.submit(
            prompt, params, priority=request.priority or 0, adapter=self._served[request.model]
        )

    async def chat(self, request: ChatRequest) -> Response:
        if request.model not in self._served:
            return self._refuse_model(request.model)
        ids = self._tokenizer.encode_chat(request.messages, add_generation_prompt=True)
        params = request.sampling_params_for(self._context_of(request.model) - len(ids))
        stream = await self._submit(ids, params, request)
        answer = ChatAnswer(stream, request.model, self._tokenizer)
        if request.stream:
            return EventStreamResponse(stream, answer.events(request.wants_usage_chunk))
        return JSONResponse((await answer.whole()).model_dump())

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        if request.messages is not None:
            ids = self._tokenizer.encode_chat(request.messages, add_generation_prompt=request.add_generation_prompt)
        else:
            assert request.prompt is not None, "one of both is given"
            encode = self._tokenizer.encode_rendered if request.parse_special else self._tokenizer.encode
            ids = [*(self._tokenizer.start_of_text_ids if request.add_special_tokens else ()), *encode(request.prompt)]
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine_loop.max_model_len}

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, str]:
        if outside := [token for token in request.tokens if not 0 <= token < self._tokenizer.vocab_size]:
            allowed = f"0 to {self._tokenizer.vocab_size - 1}"
            raise RequestError("a token id is outside the vocabulary", got=outside[0], allowed=allowed)
        return {"prompt": self._tokenizer.core.decode(request.tokens, skip_special_tokens=False)}

    async def describe_tokenizer(self) -> dict[str, Any]:
        """Name the special tokens, and give the chat template."""
        template = self._tokenizer.chat_template
        named = {name: self._tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        return named | {"chat_template": template.sources.get("default") if template else None}

    async def list_models(self) -> ModelList:
        cards = [
            ModelCard(
                id=name,
                created=self._created,
                max_model_len=self._context_of(name),
                parent=None if adapter is None else self._model_name,
            )
            for name, adapter in self._served.items()
        ]
        return ModelList(data=cards)

    def _context_of(self, model: str) -> int:
        """Longest prompt and answer together; a soft prompt takes its part of the context."""
        return self._engine_loop.max_model_len - self._engine_loop.adapters.get(model, 0)

    def _refuse_model(self, name: str) -> Response:
        message = f"no such model; got: {name!r}; allowed: {', '.join(self._served)}"
        detail = ErrorDetail(message=message, type="invalid_request_error", param="model", code="model_not_found")
        return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=404)

    async def health(self) -> dict[str, Any]:
        """Tell that the engine runs, and its load."""
        self._engine_loop.check()
        return {"status": "ok", **self._engine_loop.stats}


class EventStreamResponse(StreamingResponse):
    """Server-sent events of one request; however the response ends, the request does not outlive it."""

    def __init__(self, stream: Stream, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def _answer_error(_: Request, error: Exception) -> Response:
    statuses = {QueueFullError: 429, EngineError: 503}
    status = next((status for kind, status in statuses.items() if isinstance(error, kind)), 400)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status != 400 else None
    return JSONResponse(ErrorBody(error=describe(error)).model_dump(), status_code=status, headers=headers)
