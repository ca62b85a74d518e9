"""The wire format of /v1/completions and /v1/models, as OpenAI's API reference has it.

A field that is not known is refused, as OpenAI does: a misspelt `max_token` is an error and not a silent default. Known
fields whose effect is not here are taken at the value that asks for nothing (n=1, echo=false, ...) and refused at any
other. null means "not given". Beyond OpenAI, as vLLM has them: `top_k` and `ignore_eos`. `user` is taken and not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from powerhouse.engine import SamplingParams

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool = False


class CompletionRequest(_Body):
    model: str
    prompt: str | list[int]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
    logit_bias: None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        if isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value)):
            return value
        raise ValueError("one string or one list of token ids")

    @field_validator("stop", mode="before")
    @classmethod
    def _strings(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ValueError("a string or a list of strings")

    @property
    def sampling_params(self) -> SamplingParams:
        """What was given, over the engine's own defaults.

        Raises:
            RequestError: a value is out of range.
        """
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(stop=stop, **given)

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Choice(BaseModel):
    index: int = 0
    text: str
    finish_reason: str | None
    logprobs: None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_prompt_tokens: int, num_output_tokens: int) -> Usage:
        return cls(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
        )


class Completion(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "powerhouse"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


def explain(errors: Sequence[Mapping[str, Any]]) -> ErrorDetail:
    """Tell the first of pydantic's errors about a request body: the field, what was got and what is allowed."""
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return ErrorDetail(message=f"the body is not JSON: {first['ctx']['error']}", type="invalid_request_error")
    message = {
        "missing": f"{path or 'body'}: missing",
        "extra_forbidden": f"{path}: unknown field",
    }.get(first["type"], f"{path or 'body'}: got {_shorten(first['input'])}; allowed: {_allowed(first['msg'])}")
    return ErrorDetail(message=message, type="invalid_request_error", param=path or None)


def _allowed(message: str) -> str:
    for prefix in ("Value error, ", "Input should be a valid ", "Input should be "):
        message = message.removeprefix(prefix)
    return "null" if message == "None" else message


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
