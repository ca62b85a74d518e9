"""Torch's checkpoints in a store: what writes and reads them, and the checksums of what was written."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from typing import Any

from pyarrow import fs
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)

from powerhouse.training.storage import Store

_BUFFER_BYTES = 2**20


class CheckpointStore(Store):
    """A store that torch can save to and load from."""

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
