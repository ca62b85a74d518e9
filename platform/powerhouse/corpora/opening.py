"""Files by path or URI, decompressed on the way, and never by more than text can be compressed."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec import AbstractFileSystem
from pyarrow.fs import FileSelector, FileType, S3FileSystem

from powerhouse.errors import InputError

MAX_RATIO = 200
"""Text is compressed to a third or a tenth. What unpacks to more than this is a bomb, or nothing worth reading."""
FREE_BYTES = 2**26
"""As much is unpacked at any ratio."""
_BUFFER_BYTES = 2**20
_S3 = "s3://"

_CODECS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
}
COMPRESSED = tuple(_CODECS)


def ending_of(location: str | Path) -> str:
    """Give the ending of a file's name without that of its compression, in lower case: .txt for a.txt.gz."""
    path = PurePosixPath(str(location).lower())
    return path.with_suffix("").suffix if path.suffix in _CODECS else path.suffix


@dataclass(frozen=True)
class RemoteFile:
    """A file below a folder that a URI names."""

    name: str
    """Path below the folder, with `/`."""
    size_bytes: int
    version: str
    """Another one after the file has changed: its size and date, or its ETag."""


def list_remote(uri: str) -> list[RemoteFile]:
    """List all files below a folder.

    Raises:
        InputError: it is not there, or there is no right to list it.
    """
    try:
        if uri.startswith(_S3):
            return _list_s3(uri)
        return _list_fsspec(*fsspec.core.url_to_fs(uri))
    except Exception as error:  # each of fsspec's file systems has errors of its own
        do = "check the URI, the rights, and that the package for this protocol is installed"
        raise InputError(f"{uri} cannot be listed", got=f"{type(error).__name__}: {error}", do=do) from None


def _list_fsspec(system: AbstractFileSystem, root: str) -> list[RemoteFile]:
    found = system.find(root, detail=True)
    if not found:
        system.info(root)  # some take a folder that is not there, or a server that is gone, for an empty folder
    with ThreadPoolExecutor() as pool:  # a page of links, which is a folder over HTTP, tells no sizes
        known = pool.map(lambda path: found[path] if found[path]["size"] is not None else system.info(path), found)
    return [
        RemoteFile(path[len(root) :].lstrip("/"), int(info["size"] or 0), _version(system, path, info))
        for path, info in zip(found, known, strict=True)
    ]


def _version(system: AbstractFileSystem, path: str, info: dict[str, Any]) -> str:
    """Give what changes with the file: fsspec's own key is for HTTP that of the address alone."""
    return " ".join(str(part) for part in (system.ukey(path), *(info.get(name) for name in ("size", "ETag", "Last-Modified"))))


def _list_s3(uri: str) -> list[RemoteFile]:
    system, root = _s3_place(uri)
    found = system.get_file_info(FileSelector(root, recursive=True))
    files = [info for info in found if info.type == FileType.File]
    return [RemoteFile(info.path[len(root) :].lstrip("/"), info.size, f"{info.size} {info.mtime_ns}") for info in files]


def _s3_place(uri: str) -> tuple[S3FileSystem, str]:
    """Give the file system and the path in it; where AWS_ENDPOINT_URL is set, of that server."""
    path = uri.removeprefix(_S3).rstrip("/")
    return _s3_system(path.partition("/")[0]), path


@cache
def _s3_system(bucket: str) -> S3FileSystem:
    return S3FileSystem.from_uri(f"{_S3}{bucket}")[0]  # it asks for the bucket's region, so once a bucket


def open_raw(location: str | Path) -> BinaryIO:
    """Open a local path, or a URI such as s3://bucket/key (pyarrow) or of what fsspec knows, as the bytes that lie there.

    Raises:
        InputError: an object is not there, or there is no right to read it.
    """
    if "://" not in str(location):
        return Path(location).open("rb")
    if not str(location).startswith(_S3):
        return io.BufferedReader(_open_fsspec(str(location)), _BUFFER_BYTES)  # fsspec's own file cannot limit a line
    try:
        system, path = _s3_place(str(location))
        return io.BufferedReader(cast(io.RawIOBase, system.open_input_file(path)), _BUFFER_BYTES)
    except OSError as error:
        do = "give this process the right, or leave it out with the glob"
        raise InputError(f"{location}: not there, or no right to read it", got=error, do=do) from None


def _open_fsspec(location: str) -> io.RawIOBase:
    system, path = fsspec.core.url_to_fs(location)
    file = system.open(path, "rb")
    if location.startswith("http"):
        try:
            file.seek((file.size or 1) - 1)
            file.read(1)
            file.seek(0)
        except ValueError:  # a server that gives no part of a file
            return _OneWay(system.open(path, "rb", block_size=0))
    return cast(io.RawIOBase, file)


class _OneWay(io.RawIOBase):
    """A file that is read from its beginning, and tells so."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._file.readinto(buffer))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_binary(location: str | Path) -> BinaryIO:
    """Open and decompress by the ending of the name."""
    file = open_raw(location)
    codec = _CODECS.get(PurePosixPath(str(location).lower()).suffix)
    if codec is None:
        return file
    return cast(BinaryIO, io.BufferedReader(_Guarded(file, codec(file), str(location)), 2**18))


def check_ratio(location: str, num_compressed: int, num_bytes: int) -> None:
    """Refuse what has unpacked to more bytes than text does.

    Raises:
        InputError: it is a decompression bomb.
    """
    if num_bytes > FREE_BYTES and num_bytes > MAX_RATIO * max(1, num_compressed):
        raise InputError(
            f"{location}: unpacks to far more than text does",
            got=f"{num_compressed:,} bytes became {num_bytes:,} and more",
            allowed=f"{MAX_RATIO} times as many, once past {FREE_BYTES:,}",
            do="leave it out with the glob, or unpack it yourself",
        )


class _Guarded(io.RawIOBase):
    """A decompressed stream that ends with an error once it is a bomb."""

    def __init__(self, file: BinaryIO, unpacked: Any, location: str) -> None:
        self._file, self._unpacked, self._location = file, unpacked, location
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_read = int(self._unpacked.readinto(buffer))
        self._num_bytes += num_read
        check_ratio(self._location, self._file.tell(), self._num_bytes)
        return num_read

    def close(self) -> None:
        if not self.closed:
            self._unpacked.close()
            self._file.close()
        super().close()
