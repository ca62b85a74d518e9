"""SmolLM2-135M from its Hugging Face directory to bf16: time and peak memory beside transformers, in one run.

    python jobs/fetch_model.py smollm2-135m-instruct && python benchmarks/model_loading.py [--model DIRECTORY]

Each load is a process of its own. Memory is the peak of resident memory over that of the same interpreter with torch (and
transformers, for its own row) imported, as a multiple of the bf16 weights. Loads alternate; the fastest of each counts.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measuring import in_own_process, peak_rss_mib, report
from powerhouse.config import storage_root


def run_case(case: dict[str, Any]) -> dict[str, float]:
    if case["who"] == "transformers":
        from transformers import LlamaForCausalLM  # the other row does not carry its import

        load = partial(LlamaForCausalLM.from_pretrained, case["model"], dtype=torch.bfloat16)
    else:
        from powerhouse.models.hub import load_model

        load = partial(load_model, Path(case["model"]), dtype=torch.bfloat16)
    before = peak_rss_mib()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return {"seconds": seconds, "mib": peak_rss_mib() - before, "weights_mib": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=storage_root() / "models" / "smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case)))
        return
    results: dict[str, list[dict[str, Any]]] = {"powerhouse": [], "transformers": []}
    for _ in range(arguments.rounds):
        for who, runs in results.items():
            runs.append(in_own_process(__file__, {"who": who, "model": str(arguments.model)}))
    fastest = {who: min(run["seconds"] for run in runs) for who, runs in results.items()}
    rows = []
    for who, runs in results.items():
        peak, weights = max(run["mib"] for run in runs), runs[0]["weights_mib"]
        rows.append((who, fastest[who], fastest["transformers"] / fastest[who], peak, peak / weights))
    header = ("who", "seconds", "x transformers", "peak MiB", "peak / weights")
    report("model_loading", header, rows, {"rounds": arguments.rounds, "weights MiB": round(runs[0]["weights_mib"], 1)})


if __name__ == "__main__":
    main()
