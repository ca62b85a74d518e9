from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from fakes import write_tiny_model
from powerhouse.engine import Engine, EngineConfig, LocalRunner, Output, Runner, SamplingParams
from powerhouse.engine.batch import BatchResult
from powerhouse.engine.stage import Stage
from powerhouse.engine.streaming import EngineLoop
from powerhouse.errors import EngineError, QueueFullError, RequestError
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
CONFIG = EngineConfig(device="cpu", num_threads=1, max_num_seqs=4, max_waiting_requests=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def make_engine(model: Path, runner: Runner) -> Engine:
    return Engine(read_config(model), Tokenizer.load(model), CONFIG, runner)


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine.from_directory(model, CONFIG)


@pytest.fixture
def records() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def loop(engine: Engine, records: list[tuple[str, float]]) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine, lambda name, value: records.append((name, value)))
    yield loop
    loop.stop()


async def read(loop: EngineLoop, prompt: str, params: SamplingParams = GREEDY) -> list[Output]:
    return [output async for output in (await loop.submit(prompt, params)).outputs()]


async def until(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("quantization", [None, "int8", "int8_dynamic"])
def test_compiled_decodes_say_in_the_loops_thread_what_they_say_outside_of_it(model: Path, quantization: str | None) -> None:
    settings = CONFIG.model_copy(update={"compiles": True, "quantization": quantization})
    prompts = ["Call me Ishmael.", "The quick brown fox", "It was"]

    async def read_all(loop: EngineLoop) -> list[list[Output]]:
        return [await read(loop, prompt) for prompt in prompts]

    loop = EngineLoop(Engine.from_directory(model, settings))
    try:
        answers = ["".join(output.text for output in outputs) for outputs in asyncio.run(read_all(loop))]
    finally:
        loop.stop()
    engine = Engine.from_directory(model, settings)
    assert answers == [next(engine.generate([prompt], GREEDY)).text for prompt in prompts]


def run(test: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(test, timeout=120)

    return asyncio.run(main())


def test_requests_at_the_same_time_get_the_text_that_each_gets_alone(model: Path, loop: EngineLoop) -> None:
    prompts = ["It was", "Call me", "The quick brown", "fox"]
    alone = [item.text for item in Engine.from_directory(model, CONFIG).generate(prompts, GREEDY)]

    async def together() -> list[list[Output]]:
        return await asyncio.gather(*(read(loop, prompt) for prompt in prompts))

    assert ["".join(output.text for output in outputs) for outputs in run(together())] == alone


class WaitsAfterTheFirstToken(LocalRunner):
    """A runner that goes on when the reader says that it has the first token."""

    def __init__(self, stage: Stage, may_go_on: Event) -> None:
        super().__init__(stage)
        self._may_go_on = may_go_on
        self._num_collected = 0

    def collect(self) -> BatchResult:
        self._num_collected += 1
        assert self._num_collected == 1 or self._may_go_on.wait(timeout=60)
        return super().collect()


def test_the_first_output_is_there_before_the_second_token_is_made(model: Path) -> None:
    may_go_on = Event()
    loop = EngineLoop(make_engine(model, WaitsAfterTheFirstToken(Stage.load(model, CONFIG), may_go_on)), lambda *_: None)

    async def first_then_rest() -> list[Output]:
        outputs = (await loop.submit("It was", GREEDY)).outputs()
        first = await anext(outputs)
        may_go_on.set()
        return [first, *[output async for output in outputs]]

    outputs = run(first_then_rest())
    assert [output.num_output_tokens for output in outputs] == list(range(1, 21))
    assert outputs[-1].finish_reason == "length"
    loop.stop()


def test_a_request_that_can_never_be_served_is_refused_and_the_next_one_answered(loop: EngineLoop) -> None:
    with pytest.raises(RequestError):
        run(read(loop, "x" * 1000))
    assert len(run(read(loop, "It was"))) > 0


def test_one_request_too_many_is_refused_as_queue_full(loop: EngineLoop) -> None:
    async def flood() -> list[Any]:
        return await asyncio.gather(*(read(loop, "It was", ENDLESS) for _ in range(20)), return_exceptions=True)

    results = run(flood())
    refused = [item for item in results if isinstance(item, QueueFullError)]
    answered = [item for item in results if isinstance(item, list)]
    assert refused
    assert len(refused) + len(answered) == 20
    assert {len(outputs) for outputs in answered} == {100}


def test_closing_a_stream_takes_its_request_out_of_the_engine(loop: EngineLoop) -> None:
    async def leave() -> None:
        stream = await loop.submit("It was", ENDLESS)
        await anext(stream.outputs())
        stream.close()
        await until(lambda: loop.stats["num_running"] == 0 and loop.stats["num_waiting"] == 0)

    run(leave())
    assert loop.stats["kv_cache_usage"] == 0


def test_a_reader_cancelled_while_it_waits_for_admission_leaves_nothing_behind(loop: EngineLoop) -> None:
    async def cancel_at_once() -> None:
        tasks = [asyncio.create_task(loop.submit("It was", ENDLESS)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        await read(loop, "Call me")
        await until(lambda: loop.stats["num_running"] == 0)

    run(cancel_at_once())


class LosesItsStage(LocalRunner):
    """A runner that works for five batches."""

    num_left = 5

    def collect(self) -> BatchResult:
        self.num_left -= 1
        if self.num_left < 0:
            raise EngineError("stage 1 is lost")
        return super().collect()


def test_when_the_engine_fails_every_request_ends_with_that_error_and_so_does_the_check(model: Path) -> None:
    loop = EngineLoop(make_engine(model, LosesItsStage(Stage.load(model, CONFIG))), lambda *_: None)
    loop.check()

    async def many() -> list[Any]:
        return await asyncio.gather(*(read(loop, "It was") for _ in range(4)), return_exceptions=True)

    for error in run(many()):
        assert isinstance(error, EngineError)
        assert "stage 1 is lost" in str(error)
    with pytest.raises(EngineError, match="the engine of this replica has stopped"):
        loop.check()
    with pytest.raises(EngineError, match="stage 1 is lost"):
        run(read(loop, "after"))


def test_a_loop_that_is_stopped_fails_what_is_under_way(engine: Engine) -> None:
    loop = EngineLoop(engine, lambda *_: None)

    async def stop_midway() -> None:
        stream = await loop.submit("It was", ENDLESS)
        loop.stop()
        with pytest.raises(EngineError, match="it was shut down"):
            _ = [output async for output in stream.outputs()]

    run(stop_midway())
    loop.stop()  # a second time is no matter


def test_the_metrics_count_tokens_and_time_the_first_apart(loop: EngineLoop, records: list[tuple[str, float]]) -> None:
    outputs = run(read(loop, "It was"))
    values: dict[str, list[float]] = {}
    for name, value in records:
        values.setdefault(name, []).append(value)
    assert sum(values["generation_tokens_total"]) == outputs[-1].num_output_tokens == 20
    assert values["prompt_tokens_total"] == [outputs[-1].num_prompt_tokens]
    assert len(values["time_to_first_token_seconds"]) == 1
    assert len(values["inter_token_latency_seconds"]) == len(outputs) - 1
    assert values["request_success_total"] == [1]
    assert max(values["num_requests_running"]) == 1
