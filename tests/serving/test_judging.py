"""What lm-evaluation-harness needs of an endpoint: logprobs of an echoed prompt, the tokenizer's routes, chats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from fakes import TEXTS, tiny_decoder, tiny_tokenizer, write_tiny_model
from powerhouse.engine import Engine, EngineConfig
from powerhouse.engine.streaming import EngineLoop
from powerhouse.models.hub import load_decoder, save_model
from powerhouse.models.kernels import causal_attention
from powerhouse.serving.api import make_api
from powerhouse.tokenizer import Tokenizer

CONFIG = EngineConfig(device="cpu", num_threads=1, max_num_seqs=4, max_waiting_requests=8)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = [tiny_tokenizer().encode(text)[:20] for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_model(tmp_path_factory.mktemp("model"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def api(model: Path) -> Iterator[FastAPI]:
    loop = EngineLoop(Engine.from_directory(model, CONFIG), lambda name, value: None)
    yield make_api(loop, "demo")
    loop.stop()


def ask(api: FastAPI, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test", timeout=60) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(send())


def judge(api: FastAPI, prompt: Any, **changes: Any) -> dict[str, Any]:
    """lm-eval's own request."""
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer: dict[str, Any] = ask(api, "POST", "/v1/completions", body | changes).json()
    return answer


@torch.inference_mode()
def test_every_echoed_token_has_the_models_logprob_and_its_rival_and_one_new_token_follows(api: FastAPI, model: Path) -> None:
    decoder = load_decoder(model)

    answer = judge(api, ROWS)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, row in zip(answer["choices"], ROWS, strict=True):
        logprobs = choice["logprobs"]
        assert {len(found) for found in logprobs.values()} == {len(row) + 1}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        expected_TV = decoder(torch.tensor([row]), torch.arange(len(row)))[0].log_softmax(-1)
        for place, token in enumerate([*row[1:], int(expected_TV[-1].argmax())]):
            told, top = logprobs["token_logprobs"][place + 1], logprobs["top_logprobs"][place + 1]
            assert told == pytest.approx(float(expected_TV[place, token]), abs=1e-5)
            assert max(top.values()) == pytest.approx(float(expected_TV[place].max()), abs=1e-5)
            assert (told == max(top.values())) == (int(expected_TV[place].argmax()) == token), "greedy by equality"
    assert answer["usage"]["completion_tokens"] == 3


def test_several_answers_to_several_prompts_are_numbered_prompt_by_prompt(api: FastAPI) -> None:
    asked = {"temperature": 1.0, "max_tokens": 4, "n": 3}
    alone = [judge(api, row, **asked)["choices"] for row in ROWS]
    together = judge(api, ROWS, **asked)["choices"]
    assert [choice["index"] for choice in together] == list(range(9))
    assert [choice["text"] for choice in together] == [choice["text"] for choices in alone for choice in choices]
    assert len({choice["text"] for choice in together}) == 9


def test_an_answer_does_not_depend_on_what_is_asked_beside_it_or_on_how_the_prompt_is_given(api: FastAPI) -> None:
    texts = [tiny_tokenizer().decode(row) for row in ROWS[:2]]

    together = [choice["logprobs"]["token_logprobs"] for choice in judge(api, ROWS[:2])["choices"]]

    for row, text, expected in zip(ROWS, texts, together, strict=False):
        for prompt in (row, [row], text, [text]):
            [choice] = judge(api, prompt)["choices"]
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[1:], abs=1e-5)
            assert choice["text"].startswith(text)


def test_the_tokens_of_an_echo_join_to_its_text_and_begin_where_it_is_told(api: FastAPI) -> None:
    [choice] = judge(api, "It was the best", max_tokens=0)["choices"]

    tokens, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]
    assert choice["text"] == "".join(tokens) == "It was the best"
    assert [choice["text"][start:].startswith(token) for start, token in zip(logprobs["text_offset"], tokens, strict=True)]
    assert logprobs["text_offset"][:2] == [0, len(tokens[0])]


def test_an_end_of_text_token_that_is_generated_is_told_with_its_logprob(tmp_path: Path) -> None:
    """lm-eval drops the last element: were the end of text left out, it would drop one of the answer."""
    decoder, row = tiny_decoder(), ROWS[0]
    with torch.inference_mode():
        hidden = decoder.transform(torch.tensor([row]), torch.arange(len(row)), causal_attention)[0, -1]
        decoder.lm_head.weight[0] = 50 * decoder.model.norm(hidden)
    save_model(tmp_path, decoder.config, decoder.state_dict())
    tiny_tokenizer().save(tmp_path)
    loop = EngineLoop(Engine.from_directory(tmp_path, CONFIG), lambda name, value: None)
    try:
        [choice] = judge(make_api(loop, "demo"), [row])["choices"]
    finally:
        loop.stop()

    assert (choice["finish_reason"], choice["logprobs"]["tokens"][-1]) == ("stop", "<|endoftext|>")
    assert len(choice["logprobs"]["token_logprobs"]) == len(row) + 1


def test_logprobs_of_new_tokens_come_without_an_echo_and_in_a_stream(api: FastAPI) -> None:
    [choice] = judge(api, "It was", echo=False, max_tokens=5, logprobs=3)["choices"]

    assert [len(found) for found in choice["logprobs"].values()] == [5] * 4
    assert all(3 <= len(top) <= 4 for top in choice["logprobs"]["top_logprobs"])
    assert judge(api, "It was", echo=True, logprobs=None)["choices"][0]["logprobs"] is None


def test_one_prompt_that_cannot_be_served_refuses_the_request_and_ends_the_others(api: FastAPI) -> None:
    answer = judge(api, [ROWS[0], [5, 300]], max_tokens=20)

    assert "outside the vocabulary" in answer["error"]["message"]
    deadline = time.monotonic() + 10
    while ask(api, "GET", "/health").json()["num_running"]:
        assert time.monotonic() < deadline, "the other prompt goes on for nobody"


def test_the_tokenizer_is_the_models_own(api: FastAPI, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = "It was <|endoftext|>"

    info = ask(api, "GET", "/tokenizer_info").json()
    read = ask(api, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    plain = ask(api, "POST", "/tokenize", {"prompt": text, "parse_special": False}).json()
    chat = ask(api, "POST", "/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()

    assert info == {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": None, "chat_template": TEMPLATE}
    assert (read["tokens"], read["count"]) == (tokenizer.encode_rendered(text), len(read["tokens"]))
    assert read["tokens"][-1] == tokenizer.end_of_text_id
    assert plain["tokens"] == tokenizer.encode(text)
    assert chat["tokens"] == tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert ask(api, "POST", "/detokenize", {"tokens": read["tokens"]}).json() == {"prompt": text}
    assert ask(api, "POST", "/detokenize", {"tokens": [300]}).status_code == 400
    assert ask(api, "GET", "/v1/models").json()["data"][0]["max_model_len"] == 128


def test_a_chat_is_answered_as_its_rendered_text_is_completed(api: FastAPI, model: Path) -> None:
    messages = [{"role": "user", "content": "It was"}]
    ids = Tokenizer.load(model).encode_chat(messages, add_generation_prompt=True)
    body = {"model": "demo", "messages": messages, "max_tokens": 9, "temperature": 0}

    answer = ask(api, "POST", "/v1/chat/completions", body).json()
    stream = ask(api, "POST", "/v1/chat/completions", body | {"stream": True}).text

    text = judge(api, ids, echo=False, max_tokens=9)["choices"][0]["text"]
    message = {"role": "assistant", "content": text}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "length", "logprobs": None}]
    assert (answer["object"], answer["usage"]["completion_tokens"]) == ("chat.completion", 9)
    chunks = [httpx.Response(200, text=line[6:]).json() for line in stream.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages: got []"),
        ({"messages": [{"role": "user", "content": "Hi"}], "tools": [1]}, 400, "tools: got [1]; allowed: null"),
        ({"messages": [{"role": "user", "content": "Hi"}], "model": "gpt"}, 404, "no such model"),
        ({"messages": [{"role": "user", "content": "a " * 200}]}, 400, "longer than the context"),
    ],
)
def test_a_chat_that_can_never_be_served_gets_openais_error_body(api: FastAPI, body: Any, status: int, message: str) -> None:
    response = ask(api, "POST", "/v1/chat/completions", {"model": "demo"} | body)

    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_model_without_a_chat_template_holds_no_chats(tmp_path: Path) -> None:
    loop = EngineLoop(Engine.from_directory(write_tiny_model(tmp_path), CONFIG), lambda name, value: None)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    try:
        response = ask(make_api(loop, "demo"), "POST", "/v1/chat/completions", body)
    finally:
        loop.stop()

    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]
