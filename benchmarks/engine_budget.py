r"""Where the milliseconds of a decoding step go, and what attention in place spares.

    python jobs/fetch_model.py smollm2-135m-instruct && python benchmarks/engine_budget.py [--model DIRECTORY] \
        [--formats bfloat16 int8_dynamic] [--nums 1 8 32]

SmolLM2-135M; contexts of 100 to 300 tokens; milliseconds of CPU time of one thread, medians of steps that take turns: pages
read out for each layer (`groups`), and attention in place. `rest` is Python, rotation, activations and sums.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from measuring import report
from powerhouse.config import storage_root
from powerhouse.engine import EngineConfig
from powerhouse.engine import stage as stages
from powerhouse.engine.attention import PagedAttention
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.fused import FusedNorm
from powerhouse.engine.sampler import RowSampling
from powerhouse.engine.stage import Stage

BLOCK, NUM_STEPS, VOCABULARY = 16, 12, 49152
GREEDY = RowSampling(0.0, None, 1.0, 0.0)
PARTS = ("products", "head", "attention", "norms", "sampling")


def settings(name: str) -> dict[str, str]:
    return {"dtype": name} if "float" in name else {"quantization": name}


def batches(num: int) -> Iterator[ForwardBatch]:
    """One more token for each context, step after step, in blocks that lie anywhere."""
    chance = random.Random(0)
    lengths = [chance.randint(100, 300) for _ in range(num)]
    free = chance.sample(range(1024), 1024)
    tables = [[free.pop() for _ in range((length + 2 * NUM_STEPS) // BLOCK + 1)] for length in lengths]
    while True:
        slots = tuple(table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, lengths, strict=True))
        held = tuple(tuple(table[: at // BLOCK + 1]) for table, at in zip(tables, lengths, strict=True))
        ids = tuple(chance.randrange(VOCABULARY) for _ in lengths)
        yield ForwardBatch(ids, tuple(lengths), slots, (1,) * num, held, tuple(range(num)), (GREEDY,) * num)
        lengths = [length + 1 for length in lengths]


@contextmanager
def watched(stage: Stage) -> Iterator[Counter[str]]:
    """Add up what each part takes, in milliseconds of this thread's CPU time."""
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start_s = time.thread_time()
            result = function(*given, **named)
            spent[part] += (time.thread_time() - start_s) * 1e3  # type: ignore[assignment]
            return result

        return call

    blocks = stage.decoder.blocks.values()
    parts = [("products", layer) for b in blocks for layer in (b.qkv_proj, b.o_proj, b.gate_up_proj, b.down_proj)]
    parts += [("head", stage.decoder.lm_head)]
    parts += [("norms", module) for module in stage.decoder.modules() if isinstance(module, FusedNorm)]
    with ExitStack() as stack:
        for part, module in parts:
            stack.enter_context(patch.object(module, "forward", timed(part, module.forward)))
        for name in ("__init__", "__call__"):
            function = getattr(PagedAttention, name)
            stack.enter_context(patch.object(PagedAttention, name, timed("attention", function)))
        stack.enter_context(patch.object(stages, "sample", timed("sampling", stages.sample)))
        yield spent


def measure(stage: Stage, num: int) -> dict[bool, dict[str, float]]:
    """The median of each part and of the whole step, by whether attention is in place."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    steps = batches(num)
    with watched(stage) as spent:
        for _ in range(NUM_STEPS):
            for is_in_place, several in found.items():
                stage._cache.can_attend_in_place = is_in_place
                batch = next(steps)
                spent.clear()
                start_s = time.thread_time()
                stage.sample(batch, stage.forward(batch))
                several.append({**spent, "step": (time.thread_time() - start_s) * 1e3})
    names = (*PARTS, "step")
    return {how: {name: median(one[name] for one in several[2:]) for name in names} for how, several in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=storage_root() / "models/smollm2-135m-instruct")
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int8_dynamic", "int8", "int4"])
    parser.add_argument("--nums", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.formats:
        config = EngineConfig.model_validate({**settings(name), "num_blocks": 1024, "num_threads": 1, "device": "cpu"})
        stage = Stage.load(arguments.model, config)
        assert stage._cache.can_attend_in_place, "there is nothing to compare on this CPU"
        for num in arguments.nums:
            found = measure(stage, num)
            groups, in_place = found[False], found[True]
            rest = in_place["step"] - sum(in_place[part] for part in PARTS)
            rows.append((name, num, groups["step"], in_place["step"], groups["attention"], *(in_place[p] for p in PARTS), rest))
    header = ("format", "requests", "step, groups", "step", "attention, groups", *PARTS, "rest")
    report("engine_budget", header, rows)


if __name__ == "__main__":
    main()
