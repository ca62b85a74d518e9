"""Time and peak memory of every attention kernel beside the dense one, over lengths 512 to 16k.

    python benchmarks/attention.py [--lengths 512 1024 ...]

One causal row with the heads of SmolLM2-135M (9 query, 3 key/value heads of 64), forward alone and forward + backward.
Each case runs in a process of its own; memory is what it holds over that process before the call (resident memory on a
CPU, allocated memory on a GPU). `x` is the dense kernel's figure divided by this one's, in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from measuring import in_own_process, peak_rss_mib, report
from powerhouse.models.attention import Mask
from powerhouse.models.kernels import KERNELS

HEADS, KV_HEADS, WIDTH = 9, 3, 64
DENSE_LIMIT = 8192  # at 16k the dense kernel's scores alone are 9.7 GB, and it holds several such tensors


def run_case(case: dict[str, Any]) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(1, case["length"], heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=case["backward"]) for shape in shapes)

    def call() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(case["backward"]):
            out = KERNELS[case["kernel"]](q, k, v, Mask())
        if case["backward"]:
            out.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if device == "cuda":
        call()  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        times = [call()]
        memory = torch.cuda.max_memory_allocated() / 2**20 - before
    else:
        KERNELS[case["kernel"]](*(x[:, :16] for x in (q, k, v)), Mask())  # loads what it needs
        before = peak_rss_mib()
        times = [call()]
        memory = peak_rss_mib() - before
    while sum(times) < 1.0 and len(times) < 50:
        times.append(call())
    return {"ms": 1e3 * min(times), "mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--longest-backward", type=int, default=4096)
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case)))
        return
    kernels = ["dense", "sdpa", "chunked"] + (["flex"] if torch.cuda.is_available() else [])  # uncompiled, flex is dense
    rows = []
    for backward in (False, True):
        for length in arguments.lengths:
            if backward and length > arguments.longest_backward:
                continue
            dense = None
            for kernel in kernels:
                if kernel == "dense" and length > DENSE_LIMIT:
                    continue
                result = in_own_process(__file__, {"kernel": kernel, "length": length, "backward": backward})
                dense = result if kernel == "dense" else dense
                speed = dense["ms"] / result["ms"] if dense else "-"
                what = "forward + backward" if backward else "forward"
                rows.append((what, length, kernel, result["ms"], result["mib"], speed))
    header = ("pass", "length", "kernel", "ms", "peak MiB", "x")
    report("attention", header, rows, {"dense": f"not run over {DENSE_LIMIT}: its scores would not fit beside the others"})


if __name__ == "__main__":
    main()
