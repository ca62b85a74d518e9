from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fakes import tiny_tokenizer, write_tiny_adapter, write_tiny_model
from powerhouse.engine import Engine, EngineConfig, LocalRunner, SamplingParams
from powerhouse.engine.batch import BatchResult
from powerhouse.engine.stage import Stage
from powerhouse.engine.streaming import EngineLoop
from powerhouse.models.adapters import LoRAConfig, PromptConfig
from powerhouse.models.hub import read_config
from powerhouse.serving.api import make_api

CONFIG = EngineConfig(device="cpu", num_threads=1, max_num_seqs=2, max_waiting_requests=1)
WHOLE: dict[str, Any] = {"model": "demo", "prompt": "It was", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """The settings with a LoRA and a soft prompt of 7 tokens."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"formal": LoRAConfig(rank=3), "long": PromptConfig(num_tokens=7)}
    adapters = {name: write_tiny_adapter(folder / name, model, kind) for name, kind in kinds.items()}
    return EngineConfig.model_validate(CONFIG.model_dump() | {"adapters": adapters})


@pytest.fixture(scope="module")
def loop(model: Path, adapted: EngineConfig) -> Iterator[EngineLoop]:
    loop = EngineLoop(Engine.from_directory(model, adapted), lambda name, value: None)
    yield loop
    loop.stop()


@pytest.fixture(scope="module")
def api(loop: EngineLoop) -> FastAPI:
    return make_api(loop, "demo")


def request(api: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    return requests(api, [(method, path, arguments)])[0]


def requests(api: FastAPI, calls: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            return await asyncio.gather(*(client.request(method, path, **rest) for method, path, rest in calls))

    return asyncio.run(send())


def complete(api: FastAPI, **changes: Any) -> httpx.Response:
    return request(api, "POST", "/v1/completions", json=WHOLE | changes)


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def expected(model: Path, prompt: str, **params: Any) -> Any:
    engine = Engine.from_directory(model, CONFIG)
    return next(iter(engine.generate([prompt], SamplingParams(temperature=0, ignore_eos=True, **params))))


def test_a_completion_is_the_engines_own_with_its_counts(api: FastAPI, model: Path) -> None:
    response = complete(api)
    body = response.json()
    alone = expected(model, "It was", max_tokens=12)
    num_prompt = len(tiny_tokenizer().encode("It was"))
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert body["choices"] == [{"index": 0, "text": alone.text, "finish_reason": "length", "logprobs": None}]
    assert body["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 12, "total_tokens": num_prompt + 12}


def test_token_ids_are_a_prompt_too(api: FastAPI) -> None:
    ids = tiny_tokenizer().encode("It was")
    assert complete(api, prompt=ids).json()["choices"] == complete(api).json()["choices"]


def test_a_stream_is_chunks_that_join_to_the_whole_then_done(api: FastAPI) -> None:
    whole = complete(api).json()
    *chunks, done = events(complete(api, stream=True))
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len({json.loads(chunk)["id"] for chunk in chunks}) == 1
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_the_counts_of_a_stream_come_last_when_asked_for(api: FastAPI) -> None:
    *chunks, usage, _ = (json.loads(e) if e != "[DONE]" else e for e in events(
        complete(api, stream=True, stream_options={"include_usage": True})
    ))  # fmt: skip
    assert usage["choices"] == []
    assert usage["usage"] == complete(api).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_n_answers_are_choices_whole_and_streamed(api: FastAPI, model: Path) -> None:
    asked = {"n": 3, "temperature": 1.0, "seed": 3, "max_tokens": 6}
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    alone = [answer.text for answer in Engine.from_directory(model, CONFIG).generate(["It was"], params)]

    body = complete(api, **asked).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate(alone))
    assert body["usage"]["completion_tokens"] == 18
    assert body["usage"]["prompt_tokens"] == len(tiny_tokenizer().encode("It was"))

    lines = events(complete(api, **asked, stream=True, stream_options={"include_usage": True}))
    *chunks, usage = (json.loads(line) for line in lines[:-1])
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == alone
    assert usage["usage"] == body["usage"]


def test_a_stop_string_ends_the_text_before_it(api: FastAPI) -> None:
    text = complete(api, max_tokens=40).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    choice = complete(api, max_tokens=40, stop=stop).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_the_model_is_listed(api: FastAPI) -> None:
    body = request(api, "GET", "/v1/models").json()
    assert body["object"] == "list"
    assert {card["object"] for card in body["data"]} == {"model"}
    cards = [(card["id"], card["parent"], card["max_model_len"]) for card in body["data"]]
    assert cards == [("demo", None, 128), ("formal", "demo", 128), ("long", "demo", 121)]


def test_a_request_for_an_adapter_is_answered_with_it(api: FastAPI, model: Path, adapted: EngineConfig) -> None:
    engine = Engine.from_directory(model, adapted)
    texts = set()
    for name in (None, "formal", "long"):
        engine.add_request("It was", SamplingParams(max_tokens=12, temperature=0, ignore_eos=True), adapter=name)
        text = "".join(output.text for _ in range(12) for output in engine.step())
        body = complete(api, model=name or "demo").json()
        assert (body["model"], body["choices"][0]["text"]) == (name or "demo", text)
        streamed = [json.loads(event) for event in events(complete(api, model=name or "demo", stream=True))[:-1]]
        assert {chunk["model"] for chunk in streamed} == {name or "demo"}
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text
        texts.add(text)
    assert len(texts) == 3, "the adapters change the answer"


class StepsWhenAllowed(LocalRunner):
    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.allowed = Semaphore(0)

    def collect(self) -> BatchResult:
        self.allowed.acquire()
        return super().collect()


def test_of_what_waits_the_smallest_priority_goes_first(model: Path) -> None:
    config = EngineConfig.model_validate(CONFIG.model_dump() | {"max_num_seqs": 1, "max_waiting_requests": 8})
    runner = StepsWhenAllowed(Stage.load(model, config))
    loop = EngineLoop(Engine(read_config(model), tiny_tokenizer(), config, runner))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=make_api(loop, "demo")), base_url="http://test")
    ended: list[int | None] = []

    async def ask(priority: int | None, max_tokens: int) -> None:
        body = WHOLE | {"max_tokens": max_tokens, "priority": priority}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        ended.append(priority)

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(100, 100))
            while not loop.stats["num_running"]:
                runner.allowed.release()
                await asyncio.sleep(0.005)
            for priority in (5, None, -1):
                group.create_task(ask(priority, 3))
            while loop.stats["num_waiting"] < 3:
                runner.allowed.release()
                await asyncio.sleep(0.005)
            runner.allowed.release(200)

    asyncio.run(asyncio.wait_for(ask_all(), 60))
    loop.stop()
    assert ended == [100, -1, None, 5]


def test_health_tells_the_load(api: FastAPI) -> None:
    response = request(api, "GET", "/health")
    assert response.status_code == 200
    assert response.json()["status"] == "ok"
    assert response.json()["num_running"] == 0


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"model": "gpt"}, 404, "model", "no such model; got: 'gpt'; allowed: demo, formal, long"),
        ({"priority": 0.5}, 400, "priority", "priority: got 0.5; allowed: integer"),
        ({"model": "long", "max_tokens": 120}, 400, None, "prompt and answer are longer than the context"),
        ({"max_token": 5}, 400, "max_token", "max_token: unknown field"),
        ({"prompt": ["a", 5]}, 400, "prompt", "prompt: got ['a', 5]; allowed: a string, a list of token ids"),
        ({"prompt": ""}, 400, None, "prompt"),
        ({"prompt": [5, 300]}, 400, None, "300"),
        ({"prompt": "x" * 1000}, 400, None, "128"),
        ({"max_tokens": 1000}, 400, None, "128"),
        ({"max_tokens": 0}, 400, None, "max_tokens is out of range"),
        ({"temperature": -1}, 400, None, "temperature is out of range"),
        ({"top_p": 0}, 400, None, "top_p is out of range"),
        ({"top_k": 0}, 400, None, "top_k is out of range"),
        ({"seed": -1}, 400, None, "seed is out of range"),
        ({"stop": ""}, 400, None, "stop is out of range"),
        ({"logprobs": 50}, 400, None, "logprobs is out of range"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_can_never_be_served_gets_openais_error_body(
    api: FastAPI, changes: dict[str, Any], status: int, param: str | None, message: str, stream: bool
) -> None:
    response = complete(api, **changes, stream=stream)
    error = response.json()["error"]
    assert response.status_code == status
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(("body", "message"), [(b"{", "the body is not JSON"), (b"", "body: missing"), (b"[]", "body: got []")])
def test_a_body_that_is_no_request_gets_openais_error_body(api: FastAPI, body: bytes, message: str) -> None:
    response = request(api, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_one_request_too_many_is_told_when_to_come_back(api: FastAPI) -> None:
    body = {"json": WHOLE | {"max_tokens": 100}}
    responses = requests(api, [("POST", "/v1/completions", body)] * 12)
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert {response.status_code for response in responses} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_an_engine_that_has_stopped_is_503(model: Path) -> None:
    loop = EngineLoop(Engine.from_directory(model, CONFIG), lambda name, value: None)
    api = make_api(loop, "demo")
    loop.stop()
    for response in (complete(api), complete(api, stream=True), request(api, "GET", "/health")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_stopped"
