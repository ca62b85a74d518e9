"""Where checkpoints lie: a local folder, or a URI that Arrow's file systems know, such as s3://bucket/runs/a.

An object store is found by the usual AWS_* variables (AWS_ENDPOINT_URL for one that is not Amazon's).
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

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

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}".rstrip("/")
