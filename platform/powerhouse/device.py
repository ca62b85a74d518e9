"""Device and precision, chosen once and passed on as values."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Literal

import torch

from powerhouse.errors import ConfigError

DeviceName = Literal["auto", "cpu", "cuda"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h

DtypeName = Literal["float32", "bfloat16", "float16"]


def choose_device(name: DeviceName = "auto") -> torch.device:
    """Return the device; `auto` takes this process's CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device: no CUDA device here", got=name, allowed="cpu, auto", do="ask Ray for a GPU, or use cpu")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def to_dtype(name: DtypeName) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def upload(values: object, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers as a tensor; to a GPU by way of pinned memory, which does not wait for what the GPU has still to compute."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def computes_bfloat16(device_type: str) -> bool:
    """Whether the device has instructions for bfloat16: every GPU we support, and the CPUs that oneDNN has kernels for.

    Without them torch falls back to loops that took 28 times as long as float32 on a 1024x256 by 256x704 product.
    """
    return device_type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def reuse_freed_memory(largest_bytes: int = 32 << 20, most_bytes: int = 512 << 20) -> None:
    """Let this process keep the memory of freed tensors for the next ones, where the C library can (glibc's mallopt).

    Tensors of up to `largest_bytes` each, up to `most_bytes` in all: less than the loop frees at once is as bad as nothing.
    Otherwise every tensor of some megabytes is mapped anew, and each of its pages is cleared at its first touch: a product of
    256 rows took twice as long.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for limit_bytes in (32 << 20, largest_bytes):  # an older glibc refuses more than the first
            mallopt(_MMAP_THRESHOLD, limit_bytes)
        mallopt(_TRIM_THRESHOLD, most_bytes)
