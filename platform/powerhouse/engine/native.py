"""native.cpp, made into machine code by this machine's compiler for its own processor, and called without a copy.

Structures are those of native.cpp. They hold addresses: whoever makes one keeps the tensors.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from ctypes import CDLL, POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from powerhouse.errors import ConfigError

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
"""Not -ffast-math: linking with it has the whole process round the smallest numbers to 0."""


class Product(Structure):
    _fields_ = (
        ("codes_OI", c_void_p), ("scales_O", c_void_p), ("bias_O", c_void_p),
        ("num_inputs", c_int64), ("num_outputs", c_int64), ("levels", c_int64),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float))


class Block(Structure):
    _fields_ = (
        ("input_norm", Norm), ("mlp_norm", Norm), ("q_norm", Norm), ("k_norm", Norm),
        ("qkv_proj", Product), ("o_proj", Product), ("gate_up_proj", Product), ("down_proj", Product),
        ("k_KND", c_void_p), ("v_KND", c_void_p), ("window", c_int64),
    )  # fmt: skip


class Shape(Structure):
    _fields_ = (
        ("width", c_int64), ("num_heads", c_int64), ("num_kv_heads", c_int64), ("head_width", c_int64),
        ("num_slots", c_int64), ("page_size", c_int64), ("cos_SD", c_void_p), ("sin_SD", c_void_p),
    )  # fmt: skip


class Step(Structure):
    _fields_ = (
        ("num_tokens", c_int64), ("num_pages", c_int64), ("positions_T", c_void_p), ("tables_TM", c_void_p),
        ("num_threads", c_int64),
    )  # fmt: skip


_FUNCTIONS = {
    "norm": [POINTER(Norm), c_void_p, c_void_p, c_int64, c_int64],
    "product": [POINTER(Product), c_void_p, c_void_p, c_int64, c_int64],
    "attend": [POINTER(Shape), POINTER(Step), POINTER(Block), c_void_p, c_void_p],
    "unit": [c_void_p, c_void_p, c_void_p, c_int64, c_int64],
    "gate": [c_void_p, c_void_p, c_int64, c_int64, c_int64],
    "decode": [POINTER(Shape), POINTER(Step), POINTER(Block), c_int64, c_void_p],
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
        function.argtypes, function.restype = arguments, None
    return library


def _failed(compiler: str, reason: str) -> ConfigError:
    return ConfigError(
        f"compiles_decodes: {compiler} cannot compile",
        got=reason,
        do="install a C++ compiler, g++ (or name one by CXX), or leave it out",
    )
