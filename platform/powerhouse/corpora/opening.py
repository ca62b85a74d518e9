"""Files by path or URI, decompressed on the way, and never by more than text can be compressed."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from powerhouse.errors import InputError

MAX_RATIO = 200
"""Text is compressed to a third or a tenth. What unpacks to more than this is a bomb, or nothing worth reading."""
FREE_BYTES = 2**26
"""As much is unpacked at any ratio."""

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


def open_raw(location: str | Path) -> BinaryIO:
    """Open a local path, or what fsspec knows by a URI such as s3://bucket/key, as the bytes that lie there."""
    if "://" in str(location):
        return io.BufferedReader(fsspec.open(str(location), "rb").open(), 2**20)  # its own file cannot limit a line
    return Path(location).open("rb")


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
