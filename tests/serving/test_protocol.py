from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from powerhouse.engine import SamplingParams
from powerhouse.serving.protocol import CompletionRequest, explain

WHOLE: dict[str, Any] = {"model": "demo", "prompt": "It was"}


def test_what_is_not_given_is_left_to_the_engines_defaults() -> None:
    assert CompletionRequest(**WHOLE).sampling_params == SamplingParams()
    nulls = dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "n", "logprobs", "echo"))
    assert CompletionRequest(**WHOLE, **nulls).sampling_params == SamplingParams()


def test_what_is_given_reaches_the_engine() -> None:
    given = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 7, "seed": 9, "ignore_eos": True}
    assert CompletionRequest(**WHOLE, **given, stop="x").sampling_params == SamplingParams(**given, stop=("x",))
    assert CompletionRequest(**WHOLE, stop=["x", "y"]).sampling_params.stop == ("x", "y")


def test_known_fields_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "someone"}
    assert CompletionRequest(**WHOLE, **neutral).sampling_params == SamplingParams()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"max_token": 5}, "max_token", "max_token: unknown field"),
        ({"model": None}, "model", "model: got None; allowed: string"),
        ({"prompt": None}, "prompt", "prompt: got None; allowed: one string or one list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt", "prompt: got ['a', 'b']; allowed: one string or one list of token ids"),
        ({"prompt": [1, 2.5]}, "prompt", "prompt: got [1, 2.5]; allowed: one string or one list of token ids"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens: got '5'; allowed: integer"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot'; allowed: number"),
        ({"stop": [1]}, "stop", "stop: got [1]; allowed: a string or a list of strings"),
        ({"stream": 1}, "stream", "stream: got 1; allowed: boolean"),
        ({"n": 2}, "n", "n: got 2; allowed: 1"),
        ({"echo": True}, "echo", "echo: got True; allowed: False"),
        ({"logprobs": 5}, "logprobs", "logprobs: got 5; allowed: null"),
        ({"presence_penalty": 1.5}, "presence_penalty", "presence_penalty: got 1.5; allowed: less than or equal to 0"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "stream_options.usage: unknown field"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(WHOLE | changes)
    detail = explain(caught.value.errors())
    assert (detail.type, detail.param, detail.message) == ("invalid_request_error", param, message)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "demo"})
    assert explain(caught.value.errors()).message == "prompt: missing"


def test_a_long_value_is_told_in_short() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(WHOLE | {"prompt": ["x"] * 10_000})
    assert len(explain(caught.value.errors()).message) < 150
