"""Weight formats: one linear layer, or several side by side, in the form that is multiplied fastest.

Shapes: T tokens, I and O a layer's width in and out, G columns that share a scale (a group).

What is stored and how it is multiplied, on the CPU (`_weight_*` and `quantized::*` are the kernels torch carries):

    float32       oneDNN's own blocked layout, made once
    float16       FBGEMM: weights in float16, products and sums in float32
    bfloat16      oneDNN's layout where the CPU has instructions for bfloat16, activations rounded to it, sums float32;
                  elsewhere the rounded weights go FBGEMM's way, which keeps them as they are (below 6e-5 to 3e-8,
                  float16's smallest step)
    int8          a scale per output, activations bfloat16, sums float32
    int4          a scale and an offset per G inputs and output, activations bfloat16
    int8_dynamic  7-bit weights with a scale per output, and each row of activations rounded to 8 bits by its own largest value:
                  one bit less somewhere keeps pairs of products from overflowing 16-bit sums on AVX2, and weights need it
                  least; a row's result knows nothing of the other rows

On a GPU: plain matrices, int8 as a product that `torch.compile` fuses with the conversion, int4 by tinygemm.
On a CPU where `compiles` is asked for, native.cpp multiplies by bfloat16 and, for int8_dynamic, by 8-bit weights, if the
processor has instructions for that; and elsewhere a few rows by codes of 8 bits as they lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.device import computes_bfloat16
from powerhouse.engine import native
from powerhouse.engine.native import Kind, Weights
from powerhouse.engine.settings import EngineConfig
from powerhouse.errors import ConfigError

GROUP = 32
"""Inputs that share a scale in int4."""
_FEW_ROWS = 8
"""Up to here the kernels of weight-only formats are faster than a product of converted weights (AVX2, 3072 x 576)."""
_LEVELS, _WEIGHT_LEVELS = 127, 64
"""Largest activation and largest weight in int8_dynamic. Activations are stored as 1 to 255, and 2 x 255 x 64 is below 2^15."""

_HALF_PRODUCT = torch.ops.quantized.linear_dynamic_fp16._op
_INT8_PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32._op
"""Without torch's look for fakes among the arguments, which takes as long as a small product."""

Linears = Sequence[nn.Linear]
Make = Callable[[Tensor, Tensor | None], nn.Module]
"""Weights [O, I] and biases [O] -> a layer."""
Pack = Callable[[Linears], nn.Module]
"""Layers that read the same input -> one that gives their outputs side by side."""


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of activations: on a CPU float32, which it has kernels for; products round what they read."""
    return dtype if device.type == "cuda" else torch.float32


def pages_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of the KV cache: that of activations; on a CPU only native.cpp reads another as fast."""
    if config.compiles and dtype == torch.bfloat16:
        return dtype
    return compute_dtype(dtype, device)


def make_pack(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Pack:
    """Raises:
    ConfigError: the device has no such format.
    """
    kinds = _CPU if device.type == "cpu" else _CUDA
    if config.quantization and config.quantization not in kinds:
        allowed = ", ".join(kind for kind in kinds if kind)
        raise ConfigError(f"quantization: not on {device.type}", got=config.quantization, allowed=allowed)
    kind: Make = kinds[config.quantization]
    if config.quantization is None and device.type == "cpu":
        kind = _float_kind(dtype)
    if config.compiles and device.type == "cpu":
        kind = _native(kind)
    return lambda linears: kind(*_join(linears))


def _float_kind(dtype: torch.dtype) -> type[nn.Module]:
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return OneDnnLinear
    if dtype == torch.bfloat16 and computes_bfloat16("cpu"):
        return BFloat16Linear
    return PlainLinear if dtype == torch.float32 else HalfLinear


def _native(kind: Make) -> Make:
    """What native.cpp multiplies by, where it has such a product here, in place of this kind."""
    if kind is BFloat16Linear and native.multiplies(Kind.BFLOAT16):
        return lambda weight_OI, bias_O: NativeLinear(Weights.bfloat16(weight_OI, bias_O))
    if kind is Int8DynamicLinear and native.multiplies(Kind.INT8):
        return lambda weight_OI, bias_O: NativeLinear(Weights.int8(*quantize_int8(weight_OI), bias_O))
    return partial(Int8DynamicLinear, keeps_codes=True) if kind is Int8DynamicLinear else kind


def _join(linears: Linears) -> tuple[Tensor, Tensor | None]:
    """Weights [O, I] of all below each other, and biases [O]: zeros where only some have one."""
    weight_OI = linears[0].weight.detach()
    if len(linears) > 1:
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight_OI, None
    biases = [
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach() for linear in linears
    ]
    return weight_OI, torch.cat(biases)


class PlainLinear(nn.Module):
    """x W^T + b as it stands."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight_OI, self.bias_O = weight_OI, bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)


class NativeLinear(nn.Module):
    """What native.cpp multiplies by."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.native = weights

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.native.multiply(x_TI)


class OneDnnLinear(nn.Module):
    """float32 in oneDNN's layout."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self.bias_O = bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias_O, "none", [], "")
        return out_TO


class HalfLinear(nn.Module):
    """16-bit weights, float32 activations."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        bias_O = None if bias_O is None else bias_O.float()
        self.packed = _fbgemm(lambda: torch.ops.quantized.linear_prepack_fp16(weight_OI.float(), bias_O))

    def forward(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = _HALF_PRODUCT(x_TI, self.packed)
        return out_TO


class BFloat16Linear(nn.Module):
    """bfloat16 in oneDNN's layout, and activations rounded to it for the product."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self.bias_O = None if bias_O is None else bias_O.float()

    def forward(self, x_TI: Tensor) -> Tensor:
        half_TO = torch.ops.mkldnn._linear_pointwise(x_TI.to(torch.bfloat16), self.packed, None, "none", [], "")
        out_TO: Tensor = half_TO.float()
        return out_TO if self.bias_O is None else out_TO.add_(self.bias_O)


class Int8Linear(nn.Module):
    """int8 weights with a scale per output."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.codes_OI, scales_O = quantize_int8(weight_OI)
        self.scales_O, self.bias_O = scales_O.to(torch.bfloat16), bias_O
        most = (2**31 - 1) // (127 * weight_OI.shape[1])  # of which a sum still fits into 32 bits
        bias_O = None if bias_O is None else bias_O.float()
        levels, scales_O = min(most, 2**15 - 1), self.scales_O.float()
        self.native = Weights.codes(self.codes_OI, scales_O, bias_O, levels=levels, most_rows=_FEW_ROWS)

    def forward(self, x_TI: Tensor) -> Tensor:
        half_TI = x_TI.to(torch.bfloat16)
        if x_TI.device.type == "cpu" and len(x_TI) <= _FEW_ROWS:
            out_TO = torch._weight_int8pack_mm(half_TI, self.codes_OI, self.scales_O).to(x_TI.dtype)
        else:
            dtype = torch.bfloat16 if x_TI.device.type == "cpu" and computes_bfloat16("cpu") else x_TI.dtype
            out_TO = F.linear(half_TI.to(dtype), self.codes_OI.to(dtype)).to(x_TI.dtype) * self.scales_O.to(x_TI.dtype)
        return out_TO if self.bias_O is None else out_TO + self.bias_O


class Int4Linear(nn.Module):
    """4-bit weights with a scale and an offset per group of inputs."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        codes_OI, grid_GO2 = quantize_int4(weight_OI)
        self.grid_GO2, self.bias_O = grid_GO2.to(torch.bfloat16), bias_O
        self.packed = self._packed(codes_OI)

    def _packed(self, codes_OI: Tensor) -> Tensor:
        if codes_OI.device.type == "cpu":
            return torch._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
        pairs = (codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
        return torch._convert_weight_to_int4pack(pairs, 8)

    def forward(self, x_TI: Tensor) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu if x_TI.device.type == "cpu" else torch._weight_int4pack_mm
        out_TO = product(x_TI.to(torch.bfloat16), self.packed, GROUP, self.grid_GO2).to(x_TI.dtype)
        return out_TO if self.bias_O is None else out_TO + self.bias_O


class Int8DynamicLinear(nn.Module):
    """7-bit weights with a scale per output, and activations rounded to 8 bits row by row."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, keeps_codes: bool = False) -> None:
        """With `keeps_codes` the weights are also held as native.cpp multiplies one row by them."""
        super().__init__()
        codes_OI, scales_O = quantize_int8(weight_OI, _WEIGHT_LEVELS)
        zeros_O = torch.zeros(len(scales_O), dtype=torch.long)
        self.bias_O = None if bias_O is None else bias_O.float()
        if keeps_codes:
            self.native = Weights.codes(codes_OI, scales_O, self.bias_O, levels=_LEVELS, most_rows=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will drop the type of this argument, though not yet the kernel
            weight = torch._make_per_channel_quantized_tensor(codes_OI, scales_O.double(), zeros_O, 0)
        self.packed = _fbgemm(lambda: torch.ops.quantized.linear_prepack(weight, None))

    def forward(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI.float()
        largest_T1 = x_TI.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        return self.product(x_TI / largest_T1, largest_T1)

    def product(self, unit_TI: Tensor, largest_T1: Tensor) -> Tensor:
        """Of activations between -1 and 1, times the largest of each row."""
        out_TO: Tensor = _INT8_PRODUCT(unit_TI, 1 / _LEVELS, _LEVELS + 1, self.packed)
        out_TO.mul_(largest_T1)
        return out_TO if self.bias_O is None else out_TO + self.bias_O


def quantize_int8(weight_OI: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Codes up to `largest` on both sides of 0 [O, I] and scales [O]; a weight is about code x scale."""
    weight_OI = weight_OI.float()
    scales_O = (weight_OI.abs().amax(1) / largest).clamp(min=1e-12)
    return (weight_OI / scales_O[:, None]).round().to(torch.int8), scales_O


def quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 [O, I] and, per group and output, a scale and a centre [I / G, O, 2]: about (code - 8) x scale + centre.

    Raises:
        ConfigError: the width is not a multiple of the group's.
    """
    num_outputs, num_inputs = weight_OI.shape
    if num_inputs % GROUP:
        raise ConfigError(f"quantization: int4 takes groups of {GROUP} inputs", got=f"a layer of {num_inputs}", do="use int8")
    groups_OIG = weight_OI.float().view(num_outputs, -1, GROUP)
    low_OI1, high_OI1 = groups_OIG.amin(-1, keepdim=True), groups_OIG.amax(-1, keepdim=True)
    scale_OI1 = ((high_OI1 - low_OI1) / 15).clamp(min=1e-12)
    codes_OIG = ((groups_OIG - low_OI1) / scale_OI1).round().clamp(0, 15).to(torch.int32)
    grid_OI2 = torch.cat([scale_OI1, low_OI1 + 8 * scale_OI1], dim=-1)
    return codes_OIG.view(num_outputs, num_inputs), grid_OI2.transpose(0, 1).contiguous()


def _fbgemm(prepack: Callable[[], Any]) -> Any:
    """Pack for FBGEMM, whose kernels read only what was packed while it was torch's engine."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        return prepack()
    finally:
        torch.backends.quantized.engine = before


_CPU: dict[str | None, type[nn.Module]] = {
    None: PlainLinear,
    "int8": Int8Linear,
    "int4": Int4Linear,
    "int8_dynamic": Int8DynamicLinear,
}
_CUDA = {kind: _CPU[kind] for kind in (None, "int8", "int4")}
