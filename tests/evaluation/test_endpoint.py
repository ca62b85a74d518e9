"""A model behind an endpoint: asked as lm-evaluation-harness asks, and gone in the middle."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from endpoint import Endpoint, environment
from fakes import TEXTS, tiny_tokenizer, write_tiny_model
from powerhouse.config import validate
from powerhouse.errors import ClusterError, InputError
from powerhouse.evaluation.asking import Question, Writing
from powerhouse.evaluation.comparison import ComparisonConfig, compare_models
from powerhouse.evaluation.endpoint import EndpointConfig, EndpointRespondent
from powerhouse.evaluation.families import open_plain_decoder
from powerhouse.evaluation.launch import evaluate_model
from powerhouse.evaluation.reading import DecoderRespondent
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.evaluation.task_scores import make_plans
from powerhouse.prompting import Prompt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_ITEMS = 150
WORDS = ["It", "was", "the", "best", "worst", "age", "dog", "fox", "times", "wisdom"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def endpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    endpoint = Endpoint(model, free_port(), tmp_path_factory.mktemp("log") / "endpoint.log")
    yield endpoint
    endpoint.kill()


def write_config(folder: Path, url: str, **changes: Any) -> Path:
    items = [{"text": f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {i}", "label": ["good", "bad"][i % 2]} for i in range(NUM_ITEMS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {"kind": "label", "data": str(folder / "items.jsonl"), "template": "{text} it [MASK]", "target": "label",
            "labels": {"good": ["was"], "bad": ["the"]}}  # fmt: skip
    asked = {"url": url, "model": "demo", "num_concurrent": 2, "num_retries": 1}
    values = {"endpoint": asked, "output": str(folder / "out"), "tasks": {"moods": task}} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def read_config(path: Path) -> EvaluationConfig:
    return validate(EvaluationConfig, yaml.safe_load(path.read_text()), str(path))


def kept(folder: Path) -> list[str]:
    path = folder / "out" / "replies.jsonl"
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def wait_for(folder: Path, num_replies: int, is_alive: Callable[[], bool]) -> None:
    while len(kept(folder)) < num_replies:
        assert is_alive(), "it ended before it could be killed"
        time.sleep(0.002)
    assert len(kept(folder)) < NUM_ITEMS


def test_an_endpoint_answers_as_the_model_itself_does(endpoint: Endpoint, model: Path) -> None:
    questions = [
        Question("answers", Prompt("It was "), ("the best", "the worst of times")),
        Question("answers", Prompt("It was ", " of times"), ("the best", "the age")),
        Question("read", Prompt(TEXTS[0])),
        Question("read", Prompt(TEXTS[0]), window=9),
        Question("write", Prompt("It was "), writing=Writing(max_tokens=8)),
    ]

    theirs = EndpointRespondent(EndpointConfig(url=endpoint.url, model="demo"))(questions)
    with_own_tokenizer = EndpointRespondent(EndpointConfig(url=endpoint.url, model="demo", tokenizer=model))(questions)
    ours = DecoderRespondent(open_plain_decoder(model))(questions)

    for reply, same, expected in zip(theirs, with_own_tokenizer, ours, strict=True):
        assert reply == same
        assert reply.keys() == expected.keys()
        for name in reply:
            assert reply[name] == (expected[name] if name == "text" else pytest.approx(expected[name], abs=1e-4))


def test_a_job_and_then_an_endpoint_are_killed_and_no_question_is_answered_twice(
    endpoint: Endpoint, model: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, endpoint.url)
    command = [sys.executable, str(ROOT / "jobs" / "evaluate_model.py"), "--config", str(path)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    wait_for(tmp_path, 20, lambda: job.poll() is None)
    job.kill()
    job.communicate()
    after_job = kept(tmp_path)

    is_up: Callable[[], bool] = lambda: endpoint.process.poll() is None  # noqa: E731
    killer = threading.Thread(target=lambda: (wait_for(tmp_path, len(after_job) + 20, is_up), endpoint.kill()))
    killer.start()
    refusal = r"(completions|tokenize) does not answer\n  got: .*\n  do: .*what was answered is kept"
    with pytest.raises(ClusterError, match=refusal):
        evaluate_model(read_config(path))
    killer.join()
    after_endpoint = kept(tmp_path)
    assert after_endpoint[: len(after_job)] == after_job
    assert len(after_job) + 20 <= len(after_endpoint) < NUM_ITEMS

    endpoint.start(tmp_path / "second.log")
    evaluation = evaluate_model(read_config(path))
    assert kept(tmp_path)[: len(after_endpoint)] == after_endpoint
    assert endpoint.num_completions == NUM_ITEMS - len(after_endpoint)
    replies = dict(json.loads(line) for line in kept(tmp_path))
    assert len(replies) == len(kept(tmp_path)) == NUM_ITEMS

    plan = make_plans(read_config(path))["moods"]
    plain = DecoderRespondent(open_plain_decoder(model))(list(plan.questions()))
    for question, reply in zip(plan.questions(), plain, strict=True):
        assert replies[question.key]["logprobs"] == pytest.approx(reply["logprobs"], abs=1e-4)
    assert (evaluation.path / "report.html").read_text().count("<svg") == 1
    assert evaluation.manifest.counts["items"] == NUM_ITEMS


def test_two_evaluations_are_compared_item_by_item(endpoint: Endpoint, tmp_path: Path) -> None:
    path = write_config(tmp_path, endpoint.url)
    config = read_config(path)
    one = evaluate_model(config)
    task = config.tasks["moods"].model_copy(update={"calibrated": True})
    two = evaluate_model(config.model_copy(update={"tasks": {"moods": task}, "output": tmp_path / "two"}))

    compared = compare_models(ComparisonConfig(baseline=one.path, other=two.path, output=tmp_path / "compared"))

    found = json.loads((compared.path / "comparison.json").read_text())["moods"]["accuracy"]
    values = [json.loads((side.path / "scores.json").read_text())["moods.accuracy"]["value"] for side in (one, two)]
    assert [found["baseline"], found["other"]] == values
    assert found["difference"] == pytest.approx(values[1] - values[0])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert 0 < found["p_value"] <= 1
    page = (compared.path / "report.html").read_text()
    assert "two against out" in page
    assert "where the other gained most" in page

    other_items = config.tasks["moods"].model_copy(update={"limit": 9})
    three = evaluate_model(config.model_copy(update={"tasks": {"moods": other_items}, "output": tmp_path / "three"}))
    with pytest.raises(InputError, match=r"not of the same items in the same order\n  got: 150 and 9 items, 9 in common"):
        compare_models(ComparisonConfig(baseline=one.path, other=three.path, output=tmp_path / "compared"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt"}, InputError, r"no such model\n  got: gpt\n  allowed: demo"),
        ({"url": "http://127.0.0.1:9/v1"}, ClusterError, r"does not answer\n  got: ConnectError"),
        ({"url": "URL/chat"}, InputError, "refuses a request\n  got: 404"),
    ],
)
def test_an_endpoint_that_is_not_as_told_is_one_clear_error(
    endpoint: Endpoint, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    told = {"url": endpoint.url, "model": "demo", "num_retries": 0} | changes
    config = EndpointConfig.model_validate(told | {"url": told["url"].replace("URL", endpoint.url)})

    with pytest.raises(error, match=message):
        EndpointRespondent(config)([Question("answers", Prompt("It was "), ("the", "a"))])


def test_a_question_that_the_endpoint_cannot_serve_is_told(endpoint: Endpoint) -> None:
    respond = EndpointRespondent(EndpointConfig(url=endpoint.url, model="demo", num_retries=0))

    with pytest.raises(InputError, match="a prompt is too long for the model"):
        respond([Question("answers", Prompt(" ".join(TEXTS)), ("the", "a"))])
    with pytest.raises(InputError, match=r"refuses a request\n  got: 400: .*longer than the context"):
        respond([Question("write", Prompt("It was "), writing=Writing(max_tokens=1000))])
    assert len(tiny_tokenizer().encode(" ".join(TEXTS))) > 128
