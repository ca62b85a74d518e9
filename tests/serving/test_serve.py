"""The endpoint as users meet it: serve_apps/chat.yaml deployed on a real Ray, over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from fakes import write_tiny_model
from powerhouse.cluster.processes import find_free_port
from powerhouse.engine import Engine, EngineConfig, SamplingParams

pytestmark = [pytest.mark.slow]

CHAT_YAML = Path(__file__).parents[2] / "serve_apps" / "chat.yaml"
CONTEXT = 16_384
PROMPTS = ["It was", "Call me", "The quick brown fox", "naïf: 猫"]
GREEDY = {"model": "demo", "temperature": 0, "ignore_eos": True}
PATIENCE_S = 600  # a hang, not a slow machine


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: Path
    values: dict[str, Any]
    """What was deployed, as it stands in a Serve file."""

    def complete(self, prompt: str, max_tokens: int = 40, path: str = "", **changes: Any) -> httpx.Response:
        body = GREEDY | {"prompt": prompt, "max_tokens": max_tokens} | changes
        return httpx.post(f"{self.url}{path}/v1/completions", json=body, timeout=PATIENCE_S)

    @contextmanager
    def events(self, prompt: str, max_tokens: int) -> Iterator[Iterator[str]]:
        body = GREEDY | {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            yield (line.removeprefix("data: ") for line in response.iter_lines() if line)

    def health(self) -> dict[str, Any]:
        body: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=PATIENCE_S).raise_for_status().json()
        return body


def app_values(name: str, model: Path, **engine: Any) -> dict[str, Any]:
    """The application of chat.yaml, quick to scale and to notice a death."""
    app: dict[str, Any] = yaml.safe_load(CHAT_YAML.read_text(encoding="utf-8"))["applications"][0]
    app |= {"name": name, "route_prefix": "/" if name == "chat" else f"/{name}"}
    app["args"]["model"] = str(model)
    app["args"]["engine"] |= {"device": "cpu", "max_num_seqs": 4, "num_blocks": 2048} | engine
    app["deployments"][0] |= {"health_check_period_s": 0.5}
    app["deployments"][0]["autoscaling_config"] |= {"target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 2}
    return app


def deploy(values: dict[str, Any]) -> None:
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(values))


def status(name: str) -> Any:
    return serve.status().applications[name]


def until(is_so: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.2)
    return result


@pytest.fixture(scope="module")
def endpoint(local_ray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)
    port = find_free_port()
    apps = [app_values("chat", model), app_values("single", model, num_stages=1)]
    values = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": apps}
    try:
        serve.start(http_options=values["http_options"])
        deploy(values)
        until(lambda: all(status(app["name"]).status == "RUNNING" for app in apps))
        yield Endpoint(f"http://127.0.0.1:{port}", model, values)
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def expected(endpoint: Endpoint) -> dict[str, str]:
    """What one engine in this process says to each prompt."""
    engine = Engine.from_directory(endpoint.model, EngineConfig(device="cpu", num_threads=1))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return dict(zip(PROMPTS, (item.text for item in engine.generate(PROMPTS, params)), strict=True))


def stage_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_stage(child)]


def is_stage(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::StageActor")
    except (psutil.NoSuchProcess, IndexError):  # it has ended meanwhile
        return False


def groups() -> dict[str, list[dict[str, float]]]:
    """Bundles by the id of every placement group that stands."""
    table = ray.util.placement_group_table()
    return {
        name: [bundle for _, bundle in sorted(entry["bundles"].items())]
        for name, entry in table.items()
        if entry["state"] == "CREATED"
    }


@pytest.mark.parametrize("path", ["", "/single"])
def test_two_stages_and_one_say_over_http_what_the_engine_says(endpoint: Endpoint, expected: dict[str, str], path: str) -> None:
    said = {prompt: endpoint.complete(prompt, path=path).json()["choices"][0]["text"] for prompt in PROMPTS}
    assert said == expected


def test_a_stream_begins_before_its_last_token_is_made_and_joins_to_the_whole(endpoint: Endpoint) -> None:
    with endpoint.events("It was", 300) as events:
        lines = [next(events)]
        assert endpoint.health()["num_running"] == 1
        lines += events
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert len(choices) > 30
    assert choices[-1]["finish_reason"] == "length"
    assert "".join(choice["text"] for choice in choices) == endpoint.complete("It was", 300).json()["choices"][0]["text"]


def test_a_request_that_can_never_be_served_is_refused_over_http(endpoint: Endpoint) -> None:
    response = endpoint.complete("It was", max_tokens=CONTEXT)
    assert response.status_code == 400
    assert "longer than the context" in response.json()["error"]["message"]


def test_a_client_that_leaves_takes_its_request_with_it(endpoint: Endpoint) -> None:
    with endpoint.events("It was", CONTEXT - 100) as events:
        next(events)
        assert endpoint.health()["num_running"] == 1
    until(lambda: endpoint.health()["num_running"] == 0, timeout_s=120)
    assert endpoint.health()["kv_cache_usage"] == 0


def test_each_stage_fills_its_bundle_of_the_replicas_group(endpoint: Endpoint) -> None:
    group, bundles = next((name, bundles) for name, bundles in groups().items() if len(bundles) == 3)
    args = endpoint.values["applications"][0]["args"]
    assert bundles == [args["replica_resources"], args["stage_resources"], args["stage_resources"]]
    free = ray.available_resources()
    assert [free.get(f"CPU_group_{index}_{group}", 0) for index in range(3)] == [0, 0, 0]
    assert len(stage_processes()) == 2


def test_a_stage_killed_with_9_ends_the_stream_with_an_error_and_a_new_replica_answers(
    endpoint: Endpoint, expected: dict[str, str]
) -> None:
    before = groups()
    with endpoint.events("It was", CONTEXT - 100) as events:
        next(events)
        os.kill(stage_processes()[-1].pid, signal.SIGKILL)
        *_, error, done = events
    assert done == "[DONE]"
    assert "the engine of this replica has stopped" in json.loads(error)["error"]["message"]
    until(lambda: len(groups()) == len(before) and len(set(groups()) - set(before)) == 1)
    answer = until(lambda: response if (response := endpoint.complete("It was")).status_code == 200 else None)
    assert answer.json()["choices"][0]["text"] == expected["It was"]
    until(lambda: status("chat").status == "RUNNING")
    assert len(stage_processes()) == 2


def test_load_brings_the_second_replica_and_rest_takes_it_away(endpoint: Endpoint) -> None:
    is_enough = threading.Event()
    codes: list[int] = []

    def press() -> None:
        while not is_enough.is_set():
            codes.append(endpoint.complete("It was", 200).status_code)

    threads = [threading.Thread(target=press) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: status("chat").deployments["PipelineReplica"].replica_states.get("RUNNING") == 2)
    finally:
        is_enough.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {200}
    until(lambda: status("chat").deployments["PipelineReplica"].replica_states == {"RUNNING": 1})
    until(lambda: len(stage_processes()) == 2)


def test_a_damaged_model_fails_its_deployment_with_the_reason_and_the_model_before_it_goes_on(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    damaged = shutil.copytree(endpoint.model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    deploy(endpoint.values | {"applications": [app_values("chat", damaged), endpoint.values["applications"][1]]})
    until(lambda: status("chat").status == "DEPLOY_FAILED")
    assert f"\nModelFormatError: {weights}: damaged or truncated" in status("chat").message
    assert "Traceback" not in status("chat").message
    assert endpoint.complete("It was").status_code == 200
