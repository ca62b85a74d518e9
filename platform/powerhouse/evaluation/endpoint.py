"""Questions to a model behind an OpenAI-compatible endpoint: completions with echo and logprobs, chat, tokenizer routes.

Of probabilities it needs what lm-evaluation-harness needs (`local-completions`): prompts as token ids, `echo` with `logprobs`
over prompt and one new token, and `/tokenize`. Texts it has written by any endpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from typing import Any

import httpx
from pydantic import Field

from powerhouse.config import Config, StoragePath
from powerhouse.errors import ClusterError, InputError
from powerhouse.evaluation.asking import Question, Reply, Writing
from powerhouse.evaluation.reading import DecoderRespondent, Ids
from powerhouse.tokenizer import Tokenizer

_NUM_GENERATED = 1
"""Tokens that a scoring request also generates: servers differ in whether they take 0."""
_RETRIED = (429, 500, 502, 503, 504)


class EndpointConfig(Config):
    """An endpoint, and how it is asked. Its key, if any, is read from $OPENAI_API_KEY."""

    url: str = Field(pattern="^https?://")
    """Address with its version: http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """The name that requests give as `model`."""
    tokenizer: StoragePath | None = None
    """Directory with the model's tokenizer; where left out, the endpoint's /tokenize is asked."""
    num_concurrent: int = Field(default=8, gt=0)
    """Requests under way at a time."""
    timeout_s: float = Field(default=600, gt=0)
    """How long one request may take."""
    num_retries: int = Field(default=5, ge=0)
    """How often a request is sent again that found no server, or one that was busy or broken; each time after twice as long."""


class Endpoint:
    """A `TokenModel` over HTTP; threads may share it."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(timeout=config.timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._base = config.url.rstrip("/")
        root = self._base.removesuffix("/v1")
        self.tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else EndpointTokenizer(self, root)

    @cached_property
    def max_length(self) -> int:
        """The context that the endpoint tells of its model, less the token that scoring generates."""
        cards = self.get(f"{self._base}/models")["data"]
        card = next((card for card in cards if card["id"] == self._config.model), None)
        if card is None:
            names = ", ".join(item["id"] for item in cards)
            raise InputError(f"{self._base}: no such model", got=self._config.model, allowed=names)
        return int(card.get("max_model_len") or 2**31) - _NUM_GENERATED

    def score(self, rows: Sequence[Ids], starts: Sequence[int]) -> list[list[tuple[float, bool]]]:
        """Logprob and greediness of every token of each row from its start on, in one request.

        Raises:
            InputError: the endpoint refuses the request, or does not echo the prompt's logprobs.
        """
        if not rows:
            return []
        choices = self._complete(
            {"prompt": list(rows), "max_tokens": _NUM_GENERATED, "temperature": 0, "echo": True, "logprobs": 1}
        )
        return [_read_choice(choice, row, start) for choice, row, start in zip(choices, rows, starts, strict=True)]

    def write(self, rows: Sequence[Ids], *, max_tokens: int, temperature: float, stop: tuple[str, ...], seed: int) -> list[str]:
        """Continue each row."""
        writing = Writing(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed)
        return [choice["text"] for choice in self._complete({"prompt": list(rows), **writing_fields(writing)})]

    def write_text(self, text: str, writing: Writing) -> str:
        """Continue a text."""
        return str(self._complete({"prompt": text, **writing_fields(writing)})[0]["text"])

    def write_chat(self, messages: Sequence[Mapping[str, str]], writing: Writing) -> str:
        """Answer a conversation."""
        body = {"model": self._config.model, "messages": list(messages), **writing_fields(writing)}
        return str(self.post(f"{self._base}/chat/completions", body)["choices"][0]["message"]["content"])

    def _complete(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        answer = self.post(f"{self._base}/completions", {"model": self._config.model, **body})
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    def get(self, url: str) -> Any:
        return self._send("GET", url, None)

    def post(self, url: str, body: Mapping[str, Any]) -> Any:
        return self._send("POST", url, body)

    def _send(self, method: str, url: str, body: Mapping[str, Any] | None) -> Any:
        """Send until there is an answer.

        Raises:
            InputError: the endpoint refuses the request.
            ClusterError: it does not answer, however often it is asked.
        """
        for attempt in range(self._config.num_retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                response = self._client.request(method, url, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return response.json()
            problem = f"{response.status_code}: {response.text[:300]}"
            if response.status_code not in _RETRIED:
                raise InputError(f"{url} refuses a request", got=problem)
        do = "see that it runs and start this job again: what was answered is kept"
        raise ClusterError(f"{url} does not answer", got=f"{problem} ({self._config.num_retries + 1} times)", do=do)


def writing_fields(writing: Writing) -> dict[str, Any]:
    """The settings as fields of a request."""
    return writing.model_dump(exclude={"stop"}) | ({"stop": list(writing.stop)} if writing.stop else {})


def _read_choice(choice: Mapping[str, Any], row: Ids, start: int) -> list[tuple[float, bool]]:
    logprobs = choice.get("logprobs") or {}
    own, top = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
    if len(own) != len(row) + _NUM_GENERATED or len(top) != len(own):
        got = f"logprobs of {len(own)} tokens for a prompt of {len(row)} and {_NUM_GENERATED} new"
        do = "ask a server whose completions echo: Powerhouse, vLLM"
        raise InputError("the endpoint does not echo the prompt's logprobs", got=got, do=do)
    return [(own[place], own[place] == max(top[place].values())) for place in range(start, len(row))]


class EndpointTokenizer:
    """The tokenizer behind an endpoint; what was encoded once is not asked again."""

    def __init__(self, endpoint: Endpoint, root: str) -> None:
        self._endpoint, self._root = endpoint, root
        self._known: dict[str, Ids] = {}

    @cached_property
    def start_of_text_ids(self) -> Ids:
        """What the endpoint puts before a text."""
        return self._ask({"prompt": "", "add_special_tokens": True, "parse_special": False})

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Those that the endpoint names."""
        named = self._endpoint.get(f"{self._root}/tokenizer_info")
        return {name: token for name, token in named.items() if name.endswith("_token") and token is not None}

    def id_of(self, name: str) -> int:
        """Id of a named special token."""
        return self._ask({"prompt": self.special_tokens[name], "add_special_tokens": False})[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text alone."""
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._ask({"prompt": text, "add_special_tokens": False, "parse_special": False})
        return [self._known[text] for text in texts]

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> Ids:
        return self._ask({"messages": list(messages), "add_generation_prompt": add_generation_prompt})

    def _ask(self, body: Mapping[str, Any]) -> Ids:
        return list(self._endpoint.post(f"{self._root}/tokenize", body)["tokens"])


class EndpointRespondent:
    """Has texts written as texts and conversations, which any endpoint takes; all else goes by tokens."""

    def __init__(self, config: EndpointConfig) -> None:
        self.endpoint = Endpoint(config)
        self._by_tokens = DecoderRespondent(self.endpoint)

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Reply:
        prompt, writing = question.prompt, question.writing
        if question.kind != "write" or writing is None or prompt.after.strip() or (prompt.turns and prompt.before):
            return self._by_tokens([question])[0]
        if prompt.turns:
            return {"text": self.endpoint.write_chat(prompt.messages, writing)}
        return {"text": self.endpoint.write_text(prompt.before.rstrip(" "), writing)}


def ask_endpoint(config: EndpointConfig, questions: Mapping[str, Question]) -> Iterator[tuple[str, Reply]]:
    """Give replies as they come. After an error what is under way is still waited for, so that it is not asked again.

    Raises:
        InputError: the endpoint refuses a question.
        ClusterError: it has stopped to answer.
    """
    respondent, failure = EndpointRespondent(config), None
    with ThreadPoolExecutor(config.num_concurrent) as pool:
        keys = {pool.submit(respondent, [question]): key for key, question in questions.items()}
        for future in as_completed(list(keys)):
            if failure := future.exception():
                break
            yield keys.pop(future), future.result()[0]
        under_way = [future for future in keys if not future.cancel()]
        for future in as_completed(under_way):
            if future.exception() is None:
                yield keys[future], future.result()[0]
    if failure is not None:
        raise failure
