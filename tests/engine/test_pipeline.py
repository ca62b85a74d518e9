"""Pipelines of real processes over gloo, forked from one that has torch imported already."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as trying

from answering import Aborts, Requests, check_all, run
from fakes import write_tiny_adapter, write_tiny_model
from powerhouse.engine import Completion, Engine, EngineConfig, PipelineRunner, SamplingParams, run_stage
from powerhouse.engine.runner import Bubbles
from powerhouse.errors import EngineError
from powerhouse.models.adapters import LoRAConfig, PromptConfig
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS: list[str | list[int]] = ["It was the best of times", "Call me", [7] * 30, "猫", [1, 2, 3]]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=20, temperature=1.1, top_p=0.95, seed=3)
START_TIMEOUT_S = EXIT_TIMEOUT_S = 300

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["powerhouse.engine"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def settings(num_stages: int, **more: object) -> EngineConfig:
    limits = {"num_threads": 1, "block_size": 4, "num_blocks": 32, "max_num_batched_tokens": 16, "max_num_seqs": 8}
    return EngineConfig.model_validate({"num_stages": num_stages} | limits | more)


def expected(directory: Path, params: SamplingParams) -> list[Completion]:
    return list(Engine.from_directory(directory, settings(1)).generate(PROMPTS, params))


def start(runner: PipelineRunner, num_stages: int, directory: Path, **more: object) -> list[ForkServerProcess]:
    arguments = (num_stages, directory, settings(num_stages, **more), runner.address, runner.store_port, runner.secret)
    stages = [processes.Process(target=run_stage, args=(rank, *arguments), daemon=True) for rank in range(num_stages)]
    for stage in stages:
        stage.start()
    return stages


@contextmanager
def pipeline(num_stages: int, directory: Path, **more: object) -> Iterator[tuple[Engine, list[ForkServerProcess]]]:
    runner = PipelineRunner.listen(num_stages)
    stages = start(runner, num_stages, directory, **more)
    try:
        runner.wait_ready(START_TIMEOUT_S)
        yield Engine(read_config(directory), Tokenizer.load(directory), settings(num_stages, **more), runner), stages
    finally:
        runner.close()
        for stage in stages:
            stage.join(EXIT_TIMEOUT_S)
            stage.kill()


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_in_processes_are_one_stage_token_for_token(directory: Path, num_stages: int) -> None:
    with pipeline(num_stages, directory) as (engine, stages):
        assert list(engine.generate(PROMPTS, GREEDY)) == expected(directory, GREEDY)
        assert list(engine.generate(PROMPTS, SEEDED)) == expected(directory, SEEDED)
        ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        while engine.stats()["num_in_flight"] < num_stages - 1:
            engine.step()
        for request_id in ids[::2]:
            engine.abort(request_id)
        while engine.has_unfinished:
            engine.step()
        assert engine.stats()["kv_cache_usage"] == 0
        assert list(engine.generate(PROMPTS, GREEDY)) == expected(directory, GREEDY), "aborts leave the stages in step"
    assert [stage.exitcode for stage in stages] == [0] * num_stages


@pytest.fixture(scope="module")
def three_stages(directory: Path) -> Iterator[Engine]:
    with pipeline(3, directory) as (engine, _):
        yield engine


@trying(max_examples=15)
@given(Requests, Aborts)
def test_any_mix_on_stages_in_processes_gives_what_each_request_gives_alone(
    directory: Path, three_stages: Engine, requests: list[tuple[list[int], SamplingParams]], aborts: dict[int, int]
) -> None:
    """All through one pipeline: aborts, early ends and pre-emptions leave its stages in step."""
    check_all(run(three_stages, requests, aborts), Engine.from_directory(directory, settings(1)), requests, aborts)


@pytest.fixture(scope="module")
def adapters(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"formal": LoRAConfig(rank=3), "rude": LoRAConfig(rank=2), "short": PromptConfig(num_tokens=5)}
    return {name: write_tiny_adapter(folder / name, directory, kind, seed) for seed, (name, kind) in enumerate(kinds.items())}


@pytest.mark.parametrize("drafts", [False, True])
def test_adapters_and_guesses_in_stage_processes_are_those_of_one_stage_without(
    directory: Path, adapters: dict[str, Path], drafts: bool
) -> None:
    """Half the requests are aborted midway at first; the draft model, which reads no soft prompts, computes in the driver."""
    names = ["formal", "rude"] if drafts else list(adapters)
    loaded = {"adapters": {name: adapters[name] for name in names}, "num_blocks": 96}
    guessing = {"speculation": {"num_tokens": 3, "model": directory} if drafts else {"num_tokens": 3, "ngram": 1}}
    asked = [(prompt, name, params) for name in (None, *names) for prompt in PROMPTS[1:4] for params in (GREEDY, SEEDED)]
    alone = answers(Engine.from_directory(directory, settings(1, **loaded)), asked)
    assert len({tuple(answer) for answer in alone}) > len(asked) / 2, "adapters and parameters change the answer"
    with pipeline(2, directory, **loaded, **guessing) as (engine, _):
        answers(engine, asked, num_steps_to_abort=9)
        assert answers(engine, asked) == alone
        stats = engine.stats()
        assert 0 < stats["num_guessed_right"] < stats["num_guessed"]
        assert stats["kv_cache_usage"] == 0


def answers(
    engine: Engine, asked: list[tuple[str | list[int], str | None, SamplingParams]], num_steps_to_abort: int | None = None
) -> list[list[int]]:
    """Tokens of each request, all at once; every second one is aborted after that many steps."""
    ids = [engine.add_request(prompt, params, adapter=name) for prompt, name, params in asked]
    found: dict[str, list[int]] = {request_id: [] for request_id in ids}
    num_steps = 0
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        num_steps += 1
        for request_id in ids[::2] if num_steps == num_steps_to_abort else ():
            engine.abort(request_id)
    return list(found.values())


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_stage_is_an_error_at_the_driver_and_the_end_of_the_others(directory: Path, victim: int) -> None:
    with pipeline(3, directory) as (engine, stages):
        engine.add_request(PROMPTS[0], GREEDY)
        engine.step()
        pid = stages[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):  # the engine stays broken
            with pytest.raises(EngineError, match=r"pipeline stage \d (is lost|failed)"):
                drain(engine)
    assert stages[victim].exitcode == -signal.SIGKILL
    assert all(stage.exitcode is not None for stage in stages)


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


def drive_and_hang(directory: Path, pids: multiprocessing.SimpleQueue[list[int | None]]) -> None:
    with pipeline(2, directory) as (_, stages):
        pids.put([stage.pid for stage in stages])
        time.sleep(600)


def test_a_killed_driver_is_the_end_of_its_stages(directory: Path) -> None:
    pids = processes.SimpleQueue()
    driver = processes.Process(target=drive_and_hang, args=(directory, pids))
    driver.start()
    stages = pids.get()
    driver.kill()
    driver.join()
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while any(is_running(pid) for pid in stages):
        assert time.monotonic() < deadline, "the stages go on without a driver"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_cannot_load_is_an_error_that_says_why(directory: Path, tmp_path: Path) -> None:
    runner = PipelineRunner.listen(2)
    stages = start(runner, 2, tmp_path / "none")
    with pytest.raises(EngineError, match=r"pipeline stage \d failed\n  got: ModelFormatError: .*no such model directory"):
        runner.wait_ready(START_TIMEOUT_S)
    runner.close()
    for stage in stages:
        stage.join(EXIT_TIMEOUT_S)
        assert stage.exitcode == 1


def test_stages_that_never_come_are_an_error_after_the_timeout() -> None:
    runner = PipelineRunner.listen(2)
    with pytest.raises(EngineError, match=re.escape("pipeline stages are not ready after 0.1 s\n  got: missing: [0, 1]")):
        runner.wait_ready(0.1)
    runner.close()


def test_a_stage_that_dies_as_it_connects_is_an_error() -> None:
    runner = PipelineRunner.listen(1)
    dying = threading.Thread(target=lambda: Client(runner.address, authkey=runner.secret).close())
    dying.start()
    with pytest.raises(EngineError, match="a pipeline stage is lost: its process ended as it connected"):
        runner.wait_ready(START_TIMEOUT_S)
    dying.join()
    runner.close()


def test_who_started_the_stages_can_end_the_wait() -> None:
    def check() -> None:
        raise EngineError("the stage's actor died before it connected")

    runner = PipelineRunner.listen(2)
    with pytest.raises(EngineError, match="the stage's actor died before it connected"):
        runner.wait_ready(START_TIMEOUT_S, check)
    runner.close()


def test_strangers_are_turned_away_and_do_not_keep_the_stages_out(directory: Path) -> None:
    runner = PipelineRunner.listen(2)
    with socket.create_connection(runner.address) as silent:
        socket.create_connection(runner.address).close()
        with socket.create_connection(runner.address) as noisy:
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
            stages = start(runner, 2, directory)
            liar = threading.Thread(target=connect_with_a_wrong_secret, args=(runner.address,))
            liar.start()
            runner.wait_ready(START_TIMEOUT_S)
        assert silent.fileno() > 0
    engine = Engine(read_config(directory), Tokenizer.load(directory), settings(2), runner)
    assert list(engine.generate(PROMPTS, GREEDY)) == expected(directory, GREEDY)
    engine.close()
    liar.join()
    for stage in stages:
        stage.join(EXIT_TIMEOUT_S)
        assert stage.exitcode == 0


def connect_with_a_wrong_secret(address: tuple[str, int]) -> None:
    with pytest.raises((multiprocessing.AuthenticationError, EOFError, OSError)):
        Client(address, authkey=b"guess")


def test_a_closed_pipeline_answers_nothing(directory: Path) -> None:
    with pipeline(2, directory) as (engine, _):
        engine.add_request(PROMPTS[0], GREEDY)
        engine.step()
        engine.close()
        with pytest.raises(EngineError, match="the pipeline is closed"):
            drain(engine)


def test_both_planes_listen_on_the_given_address_only() -> None:
    runner = PipelineRunner.listen(1, host="127.0.0.2")
    ports = {runner.address[1], runner.store_port}
    for port in ports:
        socket.create_connection(("127.0.0.2", port)).close()
    # Asked of the system: at another address another process may listen on the same port.
    own = [
        at.laddr for at in psutil.Process().net_connections("tcp") if at.status == psutil.CONN_LISTEN and at.laddr.port in ports
    ]
    assert {(at.ip, at.port) for at in own} == {("127.0.0.2", port) for port in ports}
    runner.close()


def test_a_stages_bubble_is_the_share_of_the_time_under_way_in_which_it_did_not_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    bubbles = Bubbles(2)

    bubbles.begin()
    now_s = 4.0
    bubbles.tell(0, 3.0)
    bubbles.begin()
    bubbles.end()
    now_s = 10.0
    bubbles.end()
    now_s = 100.0  # nothing is under way
    bubbles.tell(0, 6.0)
    bubbles.tell(1, 10.0)
    assert bubbles.shares == [0.5, 0.0]

    bubbles.tell(1, 10.0)  # no time under way since
    assert bubbles.shares == [0.5, 0.0]
