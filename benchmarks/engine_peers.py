"""One contestant of `engine_vs_peers.py`, run by the Python of its own environment: it imports nothing of Powerhouse.

    PYTHON benchmarks/engine_peers.py '{"kind": "vllm", "model": "runs/models/smollm2", ...}'

Prints a list of {"num": n, "whole_s": ..., "first_s": ...} in a line: seconds of n prompts to `max_tokens` each, and
to one token each, which is prefill.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[list[list[int]], int], int]
"""(prompts, max_tokens) -> tokens given out in all."""


def vllm(case: dict[str, Any]) -> Answer:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{case['threads'] - 1}"}
    from vllm import LLM, SamplingParams

    eager = not case["compiles"]
    model = LLM(case["model"], dtype=case["dtype"], enforce_eager=eager, max_model_len=512, max_num_seqs=32,
                enable_prefix_caching=False)  # fmt: skip

    def answer(prompts: list[list[int]], max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return answer


def transformers(case: dict[str, Any]) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(case["threads"])
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"])).to(case["device"])

    def answer_continuously(prompts: list[list[int]], max_tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1)
        sizes = ContinuousBatchingConfig(page_size=16, num_blocks=1024, max_batch_tokens=2048)  # as many as ours
        outputs = model.generate_batch(prompts, config, sizes, persistent_manager=True)
        return sum(len(output.generated_tokens) for output in outputs.values())

    def answer(prompts: list[list[int]], max_tokens: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens)
        return int((out.shape[1] - width) * len(prompts))

    return answer_continuously if case["is_continuous"] else answer


def llama_cpp(case: dict[str, Any]) -> Answer:
    import ctypes

    import llama_cpp

    path = Path(case["gguf"])
    if case["format"]:  # made from the one at hand
        path = Path(case["scratch"]) / f"{case['format']}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, case["format"])
        params.allow_requantize = True
        failed = llama_cpp.llama_model_quantize(case["gguf"].encode(), str(path).encode(), ctypes.byref(params))
        if failed:
            raise SystemExit(f"llama.cpp could not write {path}")
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=case["threads"], n_threads_batch=case["threads"], verbose=False)

    def answer(prompts: list[list[int]], max_tokens: int) -> int:
        num_tokens = 0
        for prompt in prompts:
            model.reset()
            for _, _ in zip(range(max_tokens), model.generate(prompt, temp=0.0), strict=False):
                num_tokens += 1
        return num_tokens

    return answer


CONTESTANTS = {"vllm": vllm, "transformers": transformers, "llama.cpp": llama_cpp}


def measure(answer: Answer, case: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of each number of prompts, after a warm-up with two short ones."""
    answer([prompt[:16] for prompt in case["prompts"][: min(2, max(case["nums"]))]], 4)
    results = []
    for num in case["nums"]:
        seconds = []
        for max_tokens in (1, case["max_tokens"]):
            start = time.perf_counter()
            num_tokens = answer(case["prompts"][:num], max_tokens)
            seconds.append(time.perf_counter() - start)
            if num_tokens != num * max_tokens:
                raise SystemExit(f"{case['kind']} gave {num_tokens} tokens, not {num * max_tokens}")
        results.append({"num": num, "first_s": seconds[0], "whole_s": seconds[1]})
    return results


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure(CONTESTANTS[asked["kind"]](asked), asked)))
