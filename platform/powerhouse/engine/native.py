"""native.cpp, made into machine code by this machine's compiler for its own processor, and called without a copy.

Structures are those of native.cpp. They hold addresses: whoever makes one keeps the tensors.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from ctypes import CDLL, POINTER, Structure, byref, c_bool, c_float, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from powerhouse.errors import ConfigError

_SOURCE = Path(__file__).with_suffix(".cpp")
_PANEL = 32
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
"""Not -ffast-math: linking with it has the whole process round the smallest numbers to 0."""


class Kind(IntEnum):
    """Of the numbers that a product's weights are."""

    NONE = 0
    """What torch multiplies."""
    CODES = 1
    BFLOAT16 = 2
    INT8 = 3


class Product(Structure):
    _fields_ = (
        ("weights", c_void_p), ("scales_O", c_void_p), ("bias_O", c_void_p), ("sums_O", c_void_p),
        ("num_inputs", c_int64), ("num_outputs", c_int64), ("levels", c_int64), ("kind", c_int64),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float))


class Block(Structure):
    _fields_ = (
        ("input_norm", Norm), ("mlp_norm", Norm), ("q_norm", Norm), ("k_norm", Norm),
        ("qkv_proj", Product), ("o_proj", Product), ("gate_up_proj", Product), ("down_proj", Product),
        ("keys", c_void_p), ("values", c_void_p), ("window", c_int64),
    )  # fmt: skip


class Shape(Structure):
    _fields_ = (
        ("width", c_int64), ("num_heads", c_int64), ("num_kv_heads", c_int64), ("head_width", c_int64),
        ("num_slots", c_int64), ("page_size", c_int64), ("cosines", c_void_p), ("sines", c_void_p),
        ("number_bytes", c_int64),
    )  # fmt: skip


class Step(Structure):
    _fields_ = (
        ("num_tokens", c_int64), ("num_sequences", c_int64), ("num_pages", c_int64),
        ("positions_T", c_void_p), ("tables_NM", c_void_p), ("starts_N", c_void_p), ("num_threads", c_int64),
    )  # fmt: skip


_FUNCTIONS = {
    "multiplies": [c_int64],
    "norm": [POINTER(Norm), c_void_p, c_void_p, c_int64, c_int64, c_int64],
    "product": [POINTER(Product), c_void_p, c_void_p, c_int64, c_int64],
    "attend": [POINTER(Shape), POINTER(Step), POINTER(Block), c_void_p, c_void_p],
    "unit": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64],
    "gate": [c_void_p, c_void_p, c_int64, c_int64, c_int64],
    "run": [POINTER(Shape), POINTER(Step), POINTER(Block), c_int64, c_void_p],
}


@cache
def load() -> CDLL:
    """Compile it, in a second or two; once in a process.

    Raises:
        ConfigError: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    with TemporaryDirectory() as directory:
        path = Path(directory, "native.so")
        try:
            made = subprocess.run(
                [*shlex.split(compiler), *_FLAGS.split(), str(_SOURCE), "-o", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise _failed(compiler, str(error)) from None
        if made.returncode:
            raise _failed(compiler, next(iter(made.stderr.splitlines()), f"exit status {made.returncode}"))
        library = CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_bool if name == "multiplies" else None
    return library


def multiplies(kind: Kind) -> bool:
    """Whether native.cpp has products of this kind here; others than `CODES` need instructions for them."""
    return bool(load().multiplies(kind))


class Weights:
    """A layer's weights as native.cpp reads them."""

    def __init__(
        self,
        kind: Kind,
        weights: Tensor,
        shape: tuple[int, ...],
        scales_O: Tensor | None,
        bias_O: Tensor | None,
        sums_O: Tensor | None,
        *,
        levels: int = 0,
        most_rows: int = sys.maxsize,
    ) -> None:
        """Of `shape` [O, I]; up to `most_rows` rows no other product is faster."""
        held = weights, scales_O, bias_O, sums_O
        assert all(tensor is None or tensor.is_contiguous() for tensor in held), "native.cpp knows no strides"
        num_outputs, num_inputs = shape
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in held)
        self.product = Product(*addresses, num_inputs, num_outputs, levels, kind)
        self.most_rows, self.num_outputs, self._held = most_rows, num_outputs, held

    @classmethod
    def codes(cls, codes_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, *, levels: int, most_rows: int) -> Weights:
        """int8 as it lies, for rows of which each is rounded to `levels` steps on both sides of 0."""
        outputs = codes_OI.shape, scales_O, bias_O, None
        return cls(Kind.CODES, codes_OI, *outputs, levels=levels, most_rows=most_rows)

    @classmethod
    def bfloat16(cls, weight_OI: Tensor, bias_O: Tensor | None) -> Weights:
        bias_O = None if bias_O is None else _padded(bias_O.float())
        return cls(Kind.BFLOAT16, _panels(weight_OI, 2), weight_OI.shape, None, bias_O, None)

    @classmethod
    def int8(cls, codes_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None) -> Weights:
        bias_O = None if bias_O is None else _padded(bias_O.float())
        sums_O = _padded(codes_OI.sum(1, dtype=torch.int32) * 128)
        panels, scales_O = _panels(codes_OI, 4), _padded(scales_O)
        return cls(Kind.INT8, panels, codes_OI.shape, scales_O, bias_O, sums_O)

    def multiply(self, x_TI: Tensor) -> Tensor:
        """float32 [T, I] to [T, O], biases included."""
        x_TI = x_TI.contiguous()
        out_TO = x_TI.new_empty(len(x_TI), self.num_outputs)
        addresses = x_TI.data_ptr(), out_TO.data_ptr()
        load().product(byref(self.product), *addresses, len(x_TI), torch.get_num_threads())
        return out_TO


def _panels(weight_OI: Tensor, num_together: int) -> Tensor:
    """Outputs by PANEL, and of each panel, by inputs that lie in 32 bits, those of all its outputs side by side."""
    num_outputs, num_inputs = weight_OI.shape
    padding = (0, -num_inputs % num_together, 0, -num_outputs % _PANEL)
    padded_OI = F.pad(weight_OI, padding)
    return padded_OI.view(-1, _PANEL, padded_OI.shape[1] // num_together, num_together).transpose(1, 2).contiguous()


def _padded(values_O: Tensor) -> Tensor:
    return F.pad(values_O, (0, -len(values_O) % _PANEL))


def _failed(compiler: str, reason: str) -> ConfigError:
    return ConfigError(
        f"compiles: {compiler} cannot compile",
        got=reason,
        do="install a C++ compiler, g++ (or name one by CXX), or leave it out",
    )
