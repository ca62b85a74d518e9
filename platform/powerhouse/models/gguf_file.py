"""The layout of a GGUF file (versions 2 and 3): metadata and tensors, memory-mapped.

The `gguf` package has a reader too; it makes several arrays of every word of a vocabulary, some seconds for each file.
Its tables of block sizes and its dequantisation are used as they are.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from powerhouse.errors import ModelFormatError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: `shape` in torch's order; `data` is fp32 or fp16 of that shape, or rows of the bytes of blocks."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


class GGUFFile:
    """All metadata values, and the tensors as views of the mapped file.

    Raises:
        ModelFormatError: the file is missing, is no GGUF file, is truncated or otherwise damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelFormatError(f"{path}: no such file", do="give a GGUF file")
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise ModelFormatError(f"{path}: not a GGUF file", got=f"{magic!r} at its start", allowed=b"GGUF")
        # Copy on write: torch wants writable memory, and the file stays as it is.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        self._position = 4
        try:
            self._read()
        except (struct.error, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError) as error:
            raise ModelFormatError(f"{path}: damaged or truncated", got=error, do="fetch the file again") from None

    def _read(self) -> None:
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3 in this machine's byte order")
        num_tensors, num_values = self._unpack("QQ")
        self.values = {self._string(): self._value(*self._unpack("I")) for _ in range(num_values)}
        headers = [self._tensor_header() for _ in range(num_tensors)]
        alignment = self.values.get("general.alignment", 32)
        start = math.ceil(self._position / alignment) * alignment
        self.tensors = [self._tensor(name, kind, shape, start + offset) for name, kind, shape, offset in headers]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._bytes.data, self._position)
        self._position += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (size,) = self._unpack("Q")
        return str(self._unpack(f"{size}s")[0], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        item_kind, num_items = self._unpack("IQ")
        if item_kind in _SCALARS:
            return list(self._unpack(f"{num_items}{_SCALARS[item_kind]}"))
        return [self._value(item_kind) for _ in range(num_items)]

    def _tensor_header(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        (num_axes,) = self._unpack("I")
        shape = self._unpack(f"{num_axes}Q")[::-1]
        kind, offset = self._unpack("IQ")
        return name, GGMLQuantizationType(kind), shape, offset

    def _tensor(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], start: int) -> StoredTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = shape[-1] // block * block_bytes
        end = start + math.prod(shape[:-1]) * row_bytes
        if shape[-1] % block or end > len(self._bytes):
            raise ValueError(f"tensor {name} of shape {shape} and type {kind.name} does not fit in the file")
        data = np.asarray(self._bytes)[start:end].reshape(*shape[:-1], row_bytes)
        return StoredTensor(name, kind, shape, data.view(_FLOATS.get(kind, np.uint8)))
