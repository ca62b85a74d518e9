"""Where checkpoints lie: a local folder, or a URI that Arrow's file systems know, such as s3://bucket/runs/a.

An object store is found by the usual AWS_* variables (AWS_ENDPOINT_URL for one that is not Amazon's).
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)

from powerhouse.errors import ConfigError

_BUFFER_BYTES = 2**20


class Store:
    """A folder of files; paths are relative to it. Reading and writing raise OSError where the store does."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        try:
            self._files, self._root = fs.FileSystem.from_uri(self.location)
        except (pa.ArrowInvalid, OSError) as error:
            what = "run.checkpoints: no store is known by this name"
            raise ConfigError(what, got=f"{self.location} ({error})", allowed="a path, s3://bucket/folder") from None
        self._is_local = isinstance(self._files, fs.LocalFileSystem)

    def list_folders(self) -> list[str]:
        return [item.base_name for item in self._list("", is_recursive=False) if item.type == fs.FileType.Directory]

    def list_files(self, folder: str) -> dict[str, int]:
        """Name and size in bytes of every file of a folder; none where it is missing."""
        return {item.base_name: item.size for item in self._list(folder, is_recursive=True) if item.type == fs.FileType.File}

    def _list(self, folder: str, *, is_recursive: bool) -> list[fs.FileInfo]:
        place = fs.FileSelector(self._at(folder), allow_not_found=True, recursive=is_recursive)
        return list(self._files.get_file_info(place))

    def read(self, path: str) -> bytes:
        with self._files.open_input_file(self._at(path)) as file:
            return bytes(file.read())

    def checksum(self, path: str) -> int:
        """CRC-32 of a file's content."""
        checksum = 0
        with self._files.open_input_stream(self._at(path)) as file:
            while block := file.read(_BUFFER_BYTES):
                checksum = zlib.crc32(block, checksum)
        return checksum

    def write(self, path: str, content: bytes) -> None:
        self._files.create_dir(self._at(path).rpartition("/")[0])
        with self._files.open_output_stream(self._at(path)) as file:
            file.write(content)

    def remove(self, folder: str) -> None:
        self._files.delete_dir(self._at(folder))

    def writer(self, folder: str) -> FileSystemWriter:
        """What torch saves a checkpoint with; `checksums_of` tells what it wrote."""
        writer = FileSystemWriter(self._at(folder), sync_files=self._is_local)  # an object is durable once it is there
        self._redirect(writer, folder)
        return writer

    def reader(self, folder: str) -> FileSystemReader:
        """What torch loads a checkpoint with."""
        reader = FileSystemReader(self._at(folder))
        self._redirect(reader, folder)
        return reader

    def _redirect(self, end: Any, folder: str) -> None:
        end.fs = _LocalFiles() if self._is_local else _ArrowFiles(self._files)
        end.path = end.fs.init_path(self._at(folder))

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}".rstrip("/")


def checksums_of(writer: FileSystemWriter) -> dict[str, int]:
    """Name and CRC-32 of every file that this process has written with it."""
    assert isinstance(writer.fs, _Summing), "a store's own writer"
    return writer.fs.checksums


class _SummedStream:
    """A stream to write to, from its begin to its end."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream, self.checksum = stream, 0

    def write(self, data: Any) -> Any:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Summing(FileSystemBase):
    """Before a file system of torch's checkpoints: the checksum of every file while it is written."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:  # type: ignore[safe-super]
            if "w" not in mode:
                yield stream
                return
            summed = _SummedStream(stream)
            yield summed
        self.checksums[os.path.basename(path)] = summed.checksum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)  # type: ignore[safe-super]
        self.checksums[os.path.basename(new_path)] = self.checksums.pop(os.path.basename(path))


class _LocalFiles(_Summing, FileSystem):
    pass


class _Arrow(FileSystemBase):
    """Arrow's file system as torch's checkpoints want one."""

    _files: fs.FileSystem

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if "w" in mode:
            with self._files.open_output_stream(str(path)) as file:
                yield file
        else:
            with self._files.open_input_file(str(path)) as file:
                yield io.BufferedReader(file, _BUFFER_BYTES)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._files.move(str(path), str(new_path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._files.create_dir(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self._files.get_file_info(str(path)).type != fs.FileType.NotFound)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._files.delete_file(str(path))


class _ArrowFiles(_Summing, _Arrow):
    def __init__(self, files: fs.FileSystem) -> None:
        super().__init__()
        self._files = files
