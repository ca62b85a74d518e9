"""A pipeline of 1, 2 and 4 stages of one core each beside one stage with as many threads: tokens a second, and who waits.

    python jobs/fetch_model.py smollm2-135m-instruct && python benchmarks/pipeline_efficiency.py [--model DIRECTORY]

SmolLM2-135M; 32 prompts of 64 to 256 random tokens, 64 new tokens each, greedy, the end of text ignored. Each stage is a
process; the driver is this one. All are loaded once and take turns, and the fastest turn of each counts. On fewer cores than
stages the stages share them. `prompts` is the share of the time until every request had its first token, `waits` the share in
which each stage waited for others, halfway through. About 5 minutes on two cores, 2.5 with `--stages 2 --threads 2`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from measuring import report
from powerhouse.config import storage_root
from powerhouse.engine import Engine, EngineConfig, PipelineRunner, SamplingParams, run_stage
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

NUM_PROMPTS, MAX_TOKENS = 32, 64


class Turn(NamedTuple):
    tokens_per_s: float
    prompts: float
    waits: list[float]


def settings(num_stages: int, num_threads: int, dtype: str) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "num_stages": num_stages,
            "num_threads": num_threads,
            "num_blocks": 1024,
            "dtype": dtype,
            "device": "cpu",
            "caches_prefixes": False,
        }
    )


@contextmanager
def open_engine(model: Path, config: EngineConfig) -> Iterator[Engine]:
    if config.num_stages == 1:
        yield Engine.from_directory(model, config)
        return
    runner = PipelineRunner.listen(config.num_stages)
    context = multiprocessing.get_context("spawn")
    arguments = (config.num_stages, model, config, runner.address, runner.store_port, runner.secret)
    stages = [context.Process(target=run_stage, args=(rank, *arguments), daemon=True) for rank in range(config.num_stages)]
    for stage in stages:
        stage.start()
    try:
        runner.wait_ready(300)
        yield Engine(read_config(model), Tokenizer.load(model), config, runner)
    finally:
        runner.close()
        for stage in stages:
            stage.join()


def measure(engine: Engine, prompts: list[list[int]]) -> Turn:
    params, bubbles, unread_s = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True), [], 0.0
    start_s = time.perf_counter()
    unread = {engine.add_request(prompt, params) for prompt in prompts}
    num_tokens = 0
    while engine.has_unfinished:
        for output in engine.step():
            num_tokens += len(output.token_ids)
            unread.discard(output.request_id)
        if unread:
            unread_s = time.perf_counter() - start_s
        if num_tokens < len(prompts) * MAX_TOKENS // 2:
            bubbles = [value for name, value in engine.stats().items() if name.startswith("bubble_")]
    assert num_tokens == len(prompts) * MAX_TOKENS
    seconds = time.perf_counter() - start_s
    return Turn(num_tokens / seconds, unread_s / seconds, bubbles)


def take_turns(cases: dict[str, tuple[int, int]], model: Path, dtype: str, num_turns: int) -> dict[str, list[Turn]]:
    """The turns of each case, which is a number of stages and of threads of each."""
    generator = random.Random(0)
    prompts = [[generator.randrange(3, 49152) for _ in range(generator.randint(64, 256))] for _ in range(NUM_PROMPTS)]
    turns: dict[str, list[Turn]] = {name: [] for name in cases}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(open_engine(model, settings(num_stages, num_threads, dtype)))
            for name, (num_stages, num_threads) in cases.items()
        }
        for engine in engines.values():
            measure(engine, prompts[:2])  # warms up
        for _ in range(num_turns):
            for name, (_, num_threads) in cases.items():
                torch.set_num_threads(num_threads)  # of this process, where a single stage computes
                turns[name].append(measure(engines[name], prompts))
                print(f"{name}: {turns[name][-1].tokens_per_s:.1f} tok/s", flush=True)
    return turns


def main() -> None:
    num_cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=storage_root() / "models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, num_cores}), help="of the single stages")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    cases = {f"1 stage, {threads} threads": (1, threads) for threads in arguments.threads}
    peer = list(cases)[-1]
    cases |= {f"{stages} stages": (stages, 1) for stages in arguments.stages}
    turns = take_turns(cases, arguments.model, arguments.dtype, arguments.turns)
    best = {name: max(turns[name]) for name in cases}
    rows = [
        [name, turn.tokens_per_s, turn.tokens_per_s / best[peer].tokens_per_s, turn.prompts,
         " ".join(f"{share:.2f}" for share in turn.waits)]
        for name, turn in best.items()
    ]  # fmt: skip
    torch.set_num_threads(num_cores)
    notes = {"dtype": arguments.dtype, "cores": num_cores, "goal": "2 stages at least 0.95 of one stage with two threads"}
    report("pipeline_efficiency", ["case", "tok/s", f"of {peer}", "prompts", "waits"], rows, notes)


if __name__ == "__main__":
    main()
