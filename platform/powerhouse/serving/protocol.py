"""The wire format of /v1/completions, /v1/chat/completions and /v1/models, as OpenAI's API reference has it.

A field that is not known is refused, as OpenAI does: a misspelt `max_token` is an error and not a silent default. Known
fields whose effect is not here are taken at the value that asks for nothing (best_of=1, tools=null, ...) and refused at any
other. null means "not given". Beyond OpenAI, as vLLM has them: `top_k`, `min_p`,
`repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`, `structured_outputs` and `priority` (of what waits, the
smallest goes first). `user` is taken and not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    field_validator,
    model_serializer,
    model_validator,
)

from powerhouse.engine import Constraint, SamplingParams
from powerhouse.errors import RequestError

_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "min_tokens",
    "n",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool = False


class JsonSchema(_Body):
    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema with the type json_schema, and with no other")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "text":
            return None
        return Constraint.by_json_schema(self.json_schema.schema_ if self.json_schema else {"type": "object"})


class StructuredOutputs(_Body):
    """vLLM's way to ask for a form."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredOutputs:
        if sum(form is not None for form in (self.json_, self.regex, self.choice)) != 1:
            raise ValueError("one of json, regex and choice")
        return self

    @property
    def constraint(self) -> Constraint:
        if self.json_ is not None:
            return Constraint.by_json_schema(self.json_)
        return Constraint.by_regex(self.regex) if self.regex is not None else Constraint.by_choice(self.choice or [])


class _SampledRequest(_Body):
    """What completions and chats share."""

    model: str
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
    n: int | None = None
    logit_bias: dict[Annotated[int, Strict(False)], float] | None = None  # JSON's keys are strings
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _strings(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ValueError("a string or a list of strings")

    def _params(self, **more: Any) -> SamplingParams:
        """What was given, over the engine's own defaults."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        asked = [item.constraint for item in (self.response_format, self.structured_outputs) if item and item.constraint]
        if len(asked) > 1:
            raise RequestError("two forms of the answer are asked for", allowed="response_format or structured_outputs")
        return SamplingParams(
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self.logit_bias or {},
            constraint=asked[0] if asked else None,
            **given | more,
        )

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_SampledRequest):
    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: object) -> object:
        items = value if isinstance(value, list) else None
        if isinstance(value, str) or _are_ids(value) or (items and all(isinstance(item, str) for item in items)):
            return value
        if items and all(_are_ids(item) for item in items):
            return value
        raise ValueError("a string, a list of token ids, or a list of several of one kind")

    @model_validator(mode="after")
    def _stream_one_answer(self) -> CompletionRequest:
        if self.stream and (self.echo or len(self.prompts) > 1):
            raise ValueError("a stream of one prompt without echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or _are_ids(self.prompt)
        return [self.prompt] if is_one else self.prompt  # type: ignore[list-item,return-value]  # told apart by _are_ids

    @property
    def sampling_params(self) -> SamplingParams:
        """What was given, over the engine's own defaults.

        Raises:
            RequestError: a value is out of range.
        """
        wants_prompt = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        return self._params(logprobs=self.logprobs, prompt_logprobs=(self.logprobs or 0) if wants_prompt else None)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


class ChatRequest(_SampledRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    tools: None = None
    logprobs: Literal[False] | None = None

    def sampling_params_for(self, num_free: int) -> SamplingParams:
        """An answer may be as long as the context has room for, unless it is said how long.

        Raises:
            RequestError: a value is out of range, or there is no room.
        """
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._params(max_tokens=max(num_free, 1) if given is None else given)


class TokenizeRequest(_Body):
    """Of a text, or of a conversation by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    """Put before a text what stands there in the model's training."""
    parse_special: bool = True
    """Read a special token that the text spells; without, it is text as any other."""
    add_generation_prompt: bool = True
    """End a conversation where the assistant's answer begins."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[int]


class Logprobs(BaseModel):
    """Of each token: itself, its log-probability (null for the first of a prompt), the likeliest ones, and where it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int = 0
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None = None


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


ChatObject = Literal["chat.completion", "chat.completion.chunk"]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """Has a `message` in a whole answer and a `delta` in a chunk."""

    index: int = 0
    message: ChatMessage | None = None
    delta: ChatMessage | None = None
    finish_reason: str | None
    logprobs: None = None

    @model_serializer(mode="wrap")
    def _one_of_both(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = "message" if self.message is None else "delta"
        return {name: value for name, value in serialise(self).items() if name != unused}


class ChatCompletion(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: ChatObject
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "powerhouse"
    max_model_len: int
    """Longest prompt and answer together, in tokens; as vLLM tells it."""
    parent: str | None = None
    """Of an adapter, the model that it belongs to; as vLLM tells it."""


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
