from __future__ import annotations

import logging

import pytest
import torch

from powerhouse.engine import kernels
from powerhouse.engine.kernels import CANDIDATES, can_attend_in_place, choose_kernel, products, sdpa

CPU = torch.device("cpu")


def test_the_first_kernel_that_is_right_is_chosen_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_kernel(CPU, torch.float32, 9, 3, 64) is products
    assert caplog.messages == ["attention over pages: products"]
    wrong = {"flash": kernels.flash, "twice": lambda *given: 2 * sdpa(*given), "sdpa": sdpa}
    monkeypatch.setitem(CANDIDATES, "cpu", wrong)
    caplog.clear()
    assert choose_kernel(CPU, torch.float32, 9, 3, 64) is sdpa
    assert [message.split(":")[1] for message in caplog.messages] == [" not flash", " not twice", " sdpa"]
    assert "with 1 queries and the window None" in caplog.messages[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_of_the_cpu_is_dense_attention(dtype: torch.dtype) -> None:
    for kernel in CANDIDATES["cpu"].values():
        assert kernels._fault(kernel, CPU, dtype, (8, 2, 16)) is None


def test_queries_attend_in_place_where_that_is_dense_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert can_attend_in_place(CPU, torch.float32, 9, 3, 64)
    assert not can_attend_in_place(CPU, torch.bfloat16, 9, 3, 64), "there are no such sparse products"
    monkeypatch.setattr(kernels, "_in_place", lambda *given: 2 * sdpa(*given))
    assert not can_attend_in_place(CPU, torch.float32, 9, 3, 64)
    assert caplog.messages[0] == "decodes attend to pages in place"
    assert caplog.messages[1].startswith("decodes do not attend to pages in place: off by")


@pytest.mark.gpu
def test_every_kernel_of_the_gpu_is_dense_attention() -> None:
    for name, kernel in CANDIDATES["cuda"].items():
        assert kernels._fault(kernel, torch.device("cuda"), torch.bfloat16, (32, 8, 128)) is None, name
