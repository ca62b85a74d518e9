from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from powerhouse.engine import Constraint, SamplingParams
from powerhouse.errors import RequestError
from powerhouse.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest, explain

WHOLE: dict[str, Any] = {"model": "demo", "prompt": "It was"}


def test_what_is_not_given_is_left_to_the_engines_defaults() -> None:
    assert CompletionRequest(**WHOLE).sampling_params == SamplingParams()
    nulls = dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "n", "logprobs", "echo"))
    assert CompletionRequest(**WHOLE, **nulls).sampling_params == SamplingParams()


def test_what_is_given_reaches_the_engine() -> None:
    given = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 7, "seed": 9, "ignore_eos": True}
    assert CompletionRequest(**WHOLE, **given, stop="x").sampling_params == SamplingParams(**given, stop=("x",))
    assert CompletionRequest(**WHOLE, stop=["x", "y"]).sampling_params.stop == ("x", "y")
    penalties = {"presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_p": 0.1, "min_tokens": 2}
    assert CompletionRequest(**WHOLE, **penalties).sampling_params == SamplingParams(**penalties)
    ids = {"logit_bias": {"50": -100, "7": 1.5}, "stop_token_ids": [3, 4]}
    expected = SamplingParams(logit_bias={50: -100, 7: 1.5}, stop_token_ids=(3, 4))
    assert CompletionRequest.model_validate(WHOLE | ids).sampling_params == expected


def test_a_form_of_the_answer_is_asked_for_in_openais_way_or_in_vllms() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    by_schema = Constraint.by_json_schema(schema)
    openai = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for asked, expected in [
        ({"response_format": openai}, by_schema),
        ({"response_format": {"type": "json_object"}}, Constraint.by_json_schema({"type": "object"})),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": schema}}, by_schema),
        ({"structured_outputs": {"regex": "[ab]"}}, Constraint.by_regex("[ab]")),
        ({"structured_outputs": {"choice": ["x", "y"]}}, Constraint.by_choice(["x", "y"])),
    ]:
        assert CompletionRequest.model_validate(WHOLE | asked).sampling_params.constraint == expected
    both = {"response_format": openai, "structured_outputs": {"regex": "[ab]"}}
    with pytest.raises(RequestError, match="two forms of the answer are asked for"):
        _ = CompletionRequest.model_validate(WHOLE | both).sampling_params


def test_known_fields_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "someone"}
    assert CompletionRequest(**WHOLE, **neutral).sampling_params == SamplingParams()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"max_token": 5}, "max_token", "max_token: unknown field"),
        ({"model": None}, "model", "model: got None; allowed: string"),
        (
            {"prompt": None},
            "prompt",
            "prompt: got None; allowed: a string, a list of token ids, or a list of several of one kind",
        ),
        (
            {"prompt": ["a", 5]},
            "prompt",
            "prompt: got ['a', 5]; allowed: a string, a list of token ids, or a list of several of one kind",
        ),
        (
            {"prompt": [1, 2.5]},
            "prompt",
            "prompt: got [1, 2.5]; allowed: a string, a list of token ids, or a list of several of one kind",
        ),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens: got '5'; allowed: integer"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot'; allowed: number"),
        ({"stop": [1]}, "stop", "stop: got [1]; allowed: a string or a list of strings"),
        ({"stream": 1}, "stream", "stream: got 1; allowed: boolean"),
        ({"n": "2"}, "n", "n: got '2'; allowed: integer"),
        ({"best_of": 2}, "best_of", "best_of: got 2; allowed: 1"),
        ({"echo": 1}, "echo", "echo: got 1; allowed: boolean"),
        ({"logprobs": True}, "logprobs", "logprobs: got True; allowed: integer"),
        ({"presence_penalty": "1"}, "presence_penalty", "presence_penalty: got '1'; allowed: number"),
        ({"logit_bias": {"50": "1"}}, "logit_bias.50", "logit_bias.50: got '1'; allowed: number"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "response_format: got {'type': 'json_schema'}; allowed: json_schema with the type json_schema, and with no other",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "structured_outputs: got {'regex': 'a', 'choice': ['b']}; allowed: one of json, regex and choice",
        ),
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
        CompletionRequest.model_validate(WHOLE | {"prompt": ["x", 1] * 10_000})
    assert len(explain(caught.value.errors()).message) < 200


@pytest.mark.parametrize("more", [{"echo": True}, {"prompt": ["a", "b"]}])
def test_a_stream_is_of_one_prompt_without_echo(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="a stream of one prompt without echo"):
        CompletionRequest.model_validate(WHOLE | more | {"stream": True})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"logprobs": 2}, SamplingParams(logprobs=2)),
        ({"echo": True}, SamplingParams()),
        ({"echo": True, "logprobs": 1}, SamplingParams(logprobs=1, prompt_logprobs=1)),
        ({"echo": True, "max_tokens": 0}, SamplingParams(max_tokens=0, prompt_logprobs=0)),
    ],
)
def test_echo_with_logprobs_scores_the_prompt(given: dict[str, Any], expected: SamplingParams) -> None:
    assert CompletionRequest(**WHOLE, **given).sampling_params == expected


def test_a_chat_may_be_answered_as_long_as_the_context_has_room() -> None:
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}

    assert ChatRequest.model_validate(chat).sampling_params_for(40).max_tokens == 40
    assert ChatRequest.model_validate(chat | {"max_tokens": 5}).sampling_params_for(40).max_tokens == 5
    assert ChatRequest.model_validate(chat | {"max_completion_tokens": 6}).sampling_params_for(40).max_tokens == 6


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}])
def test_a_text_or_a_conversation_is_tokenised(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either prompt or messages"):
        TokenizeRequest.model_validate(body)
