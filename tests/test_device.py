"""Device and precision."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from powerhouse.device import reuse_freed_memory
from tests.distributed import run_on_ranks


def num_faults_of_a_loop() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        _large = [torch.ones(num_mib << 18) for num_mib in (24, 8, 8)]
        del _large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_faults() -> tuple[int, int, int]:
    usual = num_faults_of_a_loop()
    reuse_freed_memory(largest_bytes=1 << 30, most_bytes=(1 << 31) - 1)
    with ThreadPoolExecutor(1) as thread:  # as Ray Train runs the loop
        for _ in range(2):  # until the arena is as large as both need it
            num_faults_of_a_loop()
            thread.submit(num_faults_of_a_loop).result()
        return usual, num_faults_of_a_loop(), thread.submit(num_faults_of_a_loop).result()


def test_kept_memory_is_not_faulted_in_again_nor_in_a_thread_that_shares_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    [(usual, kept, kept_in_thread)] = run_on_ranks(1, count_faults)
    assert max(kept, kept_in_thread) < usual / 10
