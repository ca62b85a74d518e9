"""What a model costs to train: parameters, floating-point operations, and the share of a device's peak that a run reaches.

FLOPs of a row = 6 N P + 12 L H D P S (Chowdhery et al. 2022, PaLM, appendix B), forward and backward together: N weights of
matrix products, P positions that pass through them, L attention layers of H heads of width D, P queries on S keys. N leaves
out what is only looked up (embeddings; a tied output projection counts once) and norms. A frozen weight costs 4 in place of
6. Attention is counted whole, as PaLM does, although a causal mask hides half of it; what activation checkpointing computes
again is not counted. So an MFU from here compares with those that others publish.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from powerhouse.models.layers import Attention


@dataclass(frozen=True)
class RowFlops:
    """Of one row, forward and backward."""

    weights: int
    """In matrix products with weights."""
    attention: int
    """In products of queries, keys and values."""

    @property
    def total(self) -> int:
        return self.weights + self.attention


def count_parameters(model: nn.Module) -> int:
    """Shared ones once; the model may lie on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def row_flops(model: nn.Module, lengths: Mapping[str, int]) -> RowFlops:
    """FLOPs of a row whose `inputs` and, with an encoder-decoder, `sources` have these lengths."""
    num_inputs, num_sources = lengths["inputs"], lengths.get("sources", lengths["inputs"])
    weights = attention = 0
    for name, module in model.named_modules():
        is_encoder, is_cross = name.startswith("encoder."), ".cross_attn" in name
        num_queries, num_keys = (num_sources if is_encoder else num_inputs), (num_sources if is_cross else num_inputs)
        if isinstance(module, nn.Linear):
            sees_sources = is_encoder or name.endswith((".cross_attn.k_proj", ".cross_attn.v_proj"))
            num_positions = num_sources if sees_sources else num_inputs
            weights += (6 if module.weight.requires_grad else 4) * module.weight.numel() * num_positions
        if isinstance(module, Attention):
            num_keys = num_sources if is_encoder else num_keys
            attention += 12 * module.shape.num_heads * module.shape.head_dim * num_queries * num_keys
    return RowFlops(weights, attention)


@dataclass(frozen=True)
class Device:
    """A GPU, as its maker describes it."""

    peak_tflops: float
    """Dense bfloat16 on tensor cores, without sparsity; an MFU is against it whatever the precision."""
    memory_gb: float
    """10^9 bytes."""


DEVICES: Mapping[str, Device] = {
    "B200": Device(2250, 180),
    "H200": Device(989, 141),
    "H100 NVL": Device(835, 94),
    "H100 PCIe": Device(756, 80),
    "H100": Device(989, 80),
    "A100 40GB": Device(312, 40),
    "A100": Device(312, 80),
    "L40S": Device(362, 48),
    "L4": Device(121, 24),
    "A10": Device(125, 24),
}
"""NVIDIA's data sheets, by the words of the name that the driver gives; H100, H200 and A100 alone are the SXM boards."""


def find_device(name: str) -> Device | None:
    """The device of a name such as `NVIDIA H100 80GB HBM3`; None for one whose peak is not in the table."""
    words = set(re.split(r"[\s-]+", name.upper()))
    fits = [known for known in DEVICES if set(known.upper().split()) <= words]
    return DEVICES[max(fits, key=len)] if fits else None


@dataclass(frozen=True)
class Peak:
    """What a device could do at best."""

    flops_per_s: float
    source: str
    """Where the number is from, for the reader of an MFU."""


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """A GPU's from its data sheet, a CPU's as measured now; None for a GPU that is not in the table."""
    if device.type != "cuda":
        return Peak(measure_matmul(dtype), f"measured: the best of some {dtype} matrix products on this CPU")
    name = torch.cuda.get_device_name(device)
    found = find_device(name)
    return Peak(found.peak_tflops * 1e12, f"{name}, dense bfloat16, by its data sheet") if found else None


def measure_matmul(dtype: torch.dtype, largest: int = 512, seconds: float = 0.1) -> float:
    """Most FLOP/s of products of two square matrices on the CPU's torch threads, in about that time.

    The matrices grow while a product is quick: one of 512 x 512 takes seconds where the CPU only emulates the dtype.
    """
    size, best = min(64, largest), 0.0
    square = torch.ones(size, size, dtype=dtype)
    torch.mm(square, square)
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(square, square)
        took = time.perf_counter() - start
        best = max(best, 2 * size**3 / took)
        if 8 * took < seconds and size < largest:  # as much work as the next size is
            size *= 2
            square = torch.ones(size, size, dtype=dtype)
    return best
