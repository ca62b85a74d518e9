"""The HTTP routes over one engine: POST /v1/completions (whole or as server-sent events), GET /v1/models, GET /health.

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

from powerhouse.engine import Output
from powerhouse.errors import EngineError, QueueFullError, RequestError
from powerhouse.serving.engine_loop import EngineLoop, Stream
from powerhouse.serving.protocol import (
    Choice,
    Completion,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    ModelCard,
    ModelList,
    Usage,
    explain,
)

RETRY_AFTER_S = 1


def make_api(engine_loop: EngineLoop, model_name: str) -> FastAPI:
    """Make the routes of one replica."""
    api = FastAPI(title="Powerhouse", description=f"Serves {model_name}.")
    routes = _Routes(engine_loop, model_name)
    api.add_api_route("/v1/completions", routes.complete, methods=["POST"], response_model=None)
    api.add_api_route("/v1/models", routes.list_models)
    api.add_api_route("/health", routes.health)
    for error_class in (RequestValidationError, RequestError, EngineError):
        api.add_exception_handler(error_class, _answer_error)
    return api


class _Routes:
    def __init__(self, engine_loop: EngineLoop, model_name: str) -> None:
        self._engine_loop = engine_loop
        self._model_name = model_name
        self._created = int(time.time())

    async def complete(self, request: CompletionRequest) -> Response:
        if request.model != self._model_name:
            return _refuse_model(request.model, self._model_name)
        stream = await self._engine_loop.submit(request.prompt, request.sampling_params)
        answer = Answer(stream, self._model_name)
        if request.stream:
            return EventStreamResponse(stream, answer.events(request.wants_usage_chunk))
        return JSONResponse((await answer.whole()).model_dump())

    async def list_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id=self._model_name, created=self._created)])

    async def health(self) -> dict[str, Any]:
        """Tell that the engine runs, and its load."""
        self._engine_loop.check()
        return {"status": "ok", **self._engine_loop.stats}


class Answer:
    """One request's outputs in OpenAI's shape."""

    def __init__(self, stream: Stream, model_name: str) -> None:
        self._stream = stream
        self._model_name = model_name
        self._created = int(time.time())

    async def whole(self) -> Completion:
        texts = []
        try:
            async for output in self._stream.outputs():
                texts.append(output.text)
        finally:
            self._stream.close()
        choice = Choice(text="".join(texts), finish_reason=output.finish_reason)
        return self._completion([choice], usage=_usage(output))

    async def events(self, wants_usage: bool) -> AsyncIterator[str]:
        """Yield a chunk for every output that has text or is the last; with `wants_usage` one more for the counts."""
        exclude = None if wants_usage else {"usage"}
        try:
            async for output in self._stream.outputs():
                if output.text or output.finish_reason:
                    chunk = self._completion([Choice(text=output.text, finish_reason=output.finish_reason)])
                    yield _event(chunk.model_dump_json(exclude=exclude))
            if wants_usage:
                yield _event(self._completion([], usage=_usage(output)).model_dump_json())
        except EngineError as error:  # the status line is gone: the error goes where the rest would have been
            yield _event(ErrorBody(error=_detail(error)).model_dump_json())
        yield _event("[DONE]")

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._stream.request_id, created=self._created, model=self._model_name, choices=choices, usage=usage
        )


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


def _refuse_model(name: str, served: str) -> Response:
    message = f"no such model; got: {name!r}; allowed: {served}"
    detail = ErrorDetail(message=message, type="invalid_request_error", param="model", code="model_not_found")
    return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=404)


async def _answer_error(_: Request, error: Exception) -> Response:
    statuses = {QueueFullError: 429, EngineError: 503}
    status = next((status for kind, status in statuses.items() if isinstance(error, kind)), 400)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status != 400 else None
    return JSONResponse(ErrorBody(error=_detail(error)).model_dump(), status_code=status, headers=headers)


def _detail(error: Exception) -> ErrorDetail:
    if isinstance(error, RequestValidationError):
        return explain(error.errors())
    if isinstance(error, QueueFullError):
        return ErrorDetail(message=str(error), type="rate_limit_error", code="queue_full")
    if isinstance(error, EngineError):
        return ErrorDetail(message=str(error), type="server_error", code="engine_stopped")
    return ErrorDetail(message=str(error), type="invalid_request_error")


def _usage(output: Output) -> Usage:
    return Usage.of(output.num_prompt_tokens, output.num_output_tokens)


def _event(data: str) -> str:
    return f"data: {data}\n\n"
