"""A pipeline of 1, 2 and 4 stages of one core each beside one stage with as many threads: tokens a second, and who waits.

    python jobs/fetch_model.py smollm2-135m-instruct && python benchmarks/pipeline_efficiency.py [--model DIRECTORY]

SmolLM2-135M; 32 prompts of 64 to 256 random tokens, 64 new tokens each, greedy, the end of text ignored. Each stage is a
process; the driver is this one. The contestants take turns, and the fastest turn of each counts. On fewer cores than stages
the stages share them. `waits` is the share of the time in which each stage waited for others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import report
from powerhouse.config import storage_root
from powerhouse.engine import Engine, EngineConfig, PipelineRunner, SamplingParams, run_stage
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

NUM_PROMPTS, MAX_TOKENS, NUM_TURNS = 32, 64, 2


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


def measure(engine: Engine, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> tuple[float, list[float]]:
    """Tokens a second, and the share of waiting of each stage halfway through."""
    params, bubbles = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True), []
    start_s = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params)
    num_tokens = 0
    while engine.has_unfinished:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
        if num_tokens < len(prompts) * max_tokens // 2:
            bubbles = [value for name, value in engine.stats().items() if name.startswith("bubble_")]
    assert num_tokens == len(prompts) * max_tokens
    return num_tokens / (time.perf_counter() - start_s), bubbles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=storage_root() / "models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    generator = random.Random(0)
    prompts = [[generator.randrange(3, 49152) for _ in range(generator.randint(64, 256))] for _ in range(NUM_PROMPTS)]
    num_cores = len(os.sched_getaffinity(0))
    cases = {f"1 stage, {threads} threads": (1, threads) for threads in sorted({1, num_cores})}
    cases |= {f"{stages} stages": (stages, 1) for stages in arguments.stages}
    speeds: dict[str, float] = {}
    waits: dict[str, list[float]] = {}
    for _ in range(NUM_TURNS):
        for name, (num_stages, num_threads) in cases.items():
            with open_engine(arguments.model, settings(num_stages, num_threads, arguments.dtype)) as engine:
                measure(engine, prompts, max_tokens=4)  # warms up
                speed, bubbles = measure(engine, prompts)
            if speed > speeds.get(name, 0.0):
                speeds[name], waits[name] = speed, bubbles
            print(f"{name}: {speed:.1f} tok/s", flush=True)
    peer = speeds[f"1 stage, {num_cores} threads"]
    rows = [[name, speed, speed / peer, " ".join(f"{share:.2f}" for share in waits[name])] for name, speed in speeds.items()]
    notes = {"dtype": arguments.dtype, "cores": num_cores, "goal": "2 stages at least 0.95 of one stage with two threads"}
    report("pipeline_efficiency", ["case", "tok/s", f"of 1 stage, {num_cores} threads", "waits"], rows, notes)


if __name__ == "__main__":
    main()
