"""Where tensors come from: safetensors files of a Hugging Face directory. Never a pickle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from powerhouse.errors import ModelFormatError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BUFFER_BYTES = 1 << 22
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Protocol):
    """Tensors by the name that a Hugging Face checkpoint gives them; `gguf.GGUFWeights` is another such source."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU; in its stored type, or with None, memory-mapped where it can be."""
        ...


def write_float32(path: Path | None, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file tensor by tensor, each dropped before the next is read.

    Without a path the tensors are only read: where reading is a collective, all ranks read and one writes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = read(name).detach().to("cpu", torch.float32).contiguous()
            if path:
                tensor.numpy().tofile(file)
            del tensor


class SafetensorsWeights:
    """`model.safetensors`, or the shards that its index names.

    Raises:
        ModelFormatError: here and in `read`: no such file, or one that is damaged or truncated.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
        for path, names in _files(directory):
            header = read_header(path)
            for name in header if names is None else names:
                if name not in header:
                    raise ModelFormatError(f"{path}: tensor {name} is missing, though the index names it")
                self._files[name] = path
                self._dtypes[name], self._shapes[name], self._starts[name] = header[name]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        stored = _DTYPES.get(self._dtypes[name])
        if stored is None:
            what = f"{self._files[name]}: {name} is not of a float type"
            raise ModelFormatError(what, got=self._dtypes[name], allowed=", ".join(_DTYPES))
        if dtype in (None, stored):
            with open_safetensors(self._files[name]) as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        return self._convert(name, stored, torch.empty(self._shapes[name], dtype=dtype))

    def _convert(self, name: str, stored: torch.dtype, out: Tensor) -> Tensor:
        """Fill `out` a piece at a time: mapped pages would count as memory, and cost a fault each."""
        buffer = self._buffer.view(stored)
        flat = out.view(-1)
        with self._files[name].open("rb") as stream:
            stream.seek(self._starts[name])
            for first in range(0, len(flat), len(buffer)):
                piece = flat[first : first + len(buffer)]
                values = buffer[: len(piece)]
                stream.readinto(values.view(torch.uint8).numpy().data)
                piece.copy_(values)
        return out


def _files(directory: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """The weight files, with the names that an index expects of each."""
    if (directory / INDEX).is_file():
        weight_map: dict[str, str] = read_json(directory / INDEX).get("weight_map", {})
        for file in sorted(set(weight_map.values())):
            yield directory / file, [name for name, other in weight_map.items() if other == file]
        return
    path = directory / WEIGHTS
    if not path.is_file():
        pickles = sorted(item.name for pattern in ("*.bin", "*.pt", "*.pth") for item in directory.glob(pattern))
        got = f"{', '.join(pickles)} (a pickle can run code when it is opened)" if pickles else None
        raise ModelFormatError(f"{directory}: no {WEIGHTS}", got=got, allowed=f"{WEIGHTS}, {INDEX} or a .gguf file")
    yield path, None


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Every tensor's type, shape and first byte; a file opens with its header's length in 8 bytes, then the header in JSON.

    Raises:
        ModelFormatError: the file is missing, damaged or truncated.
    """
    with open_safetensors(path), path.open("rb") as stream:  # the library checks the header against the file's size
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: (item["dtype"], tuple(item["shape"]), 8 + length + item["data_offsets"][0]) for name, item in header.items()}


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: missing, though the index names it", do="fetch the model again") from None
    except SafetensorError as error:
        raise ModelFormatError(f"{path}: damaged or truncated", got=error, do="fetch or export the model again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a model directory."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: missing", do="give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path}: damaged", got=error, do="fetch or export the model again") from None
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path}: damaged", got=type(values).__name__, allowed="a JSON object")
    return values
