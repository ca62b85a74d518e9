"""Compressed files that are many: the members of a .gz, a WARC record each, and the streams of a .bz2, some pages of a dump.

Where one begins a worker can begin. Nothing lists these places, so a worker looks for the bytes with which each begins; they
may stand elsewhere by chance. Those of a .bz2 stream are 80 bits long; those of a .gz member are 24, so what follows is
unpacked. A record may hold records itself, of a packed file that somebody archived. DEFLATE (RFC 1951, section 3.2.4) leaves
what it cannot pack as it is, in blocks of at most 65,535 bytes: records that follow each other for longer are of this file.
"""

from __future__ import annotations

import bz2
import io
import re
import zlib
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

_GZIP = re.compile(rb"\x1f\x8b\x08")
_BZ2 = re.compile(rb"BZh[1-9]1AY&SY")
_RECORD = b"WARC/"
_MAX_STORED = 65_535
_MAX_MAGIC = 16
_READ_BYTES = 2**16
_SCAN_BYTES = 2**20


class GzipMember(io.RawIOBase):
    """What one member of a .gz holds, to be read to its end. An error waits for `skip`: fastwarc would end the process."""

    def __init__(self, file: BinaryIO, packed: bytes = b"") -> None:
        """`packed` are bytes with which it begins; the others follow in the file."""
        super().__init__()
        self._file = file
        self._packed = packed
        self._num_packed = len(packed)
        self._unpacked = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        self.error: Exception | None = None

    def tell(self) -> int:
        return 0  # fastwarc asks it once, before it reads

    def read(self, size: int = _READ_BYTES, /) -> bytes:
        """Give up to `size` bytes; none at the end of the member, and where the file is cut or damaged."""
        out = b""
        while not out and not self._unpacked.eof and self.error is None:
            try:
                packed = self._packed or self._read_packed()
                out = self._unpacked.decompress(packed, size)
                self._packed = self._unpacked.unconsumed_tail
                if not packed and not out:
                    break
            except (zlib.error, OSError) as error:
                self.error = error
        return out

    def _read_packed(self) -> bytes:
        packed = self._file.read(_READ_BYTES)
        self._num_packed += len(packed)
        return packed

    @property
    def rest(self) -> bytes:
        """Bytes of what follows it that have been read already, once all of it is read."""
        return self._unpacked.unused_data

    @property
    def num_packed(self) -> int:
        """How many bytes of the file have been unpacked."""
        return self._num_packed - len(self.rest if self._unpacked.eof else self._packed)

    def skip(self) -> None:
        """Read to the end.

        Raises:
            zlib.error: it is damaged, or no member begins there.
            OSError: the file cannot be read.
        """
        while self.read():
            pass
        if self.error is not None:
            raise self.error


def read_members(file: BinaryIO, start: int, last: int | None = None) -> Iterator[tuple[int, GzipMember]]:
    """Yield the members from the one on that begins at `start`, each with its place, up to one that begins at `last` or later.

    Raises:
        zlib.error: something else follows a member.
    """
    packed = file.read(_READ_BYTES)
    while packed and (last is None or start < last):
        member = GzipMember(file, packed)
        yield start, member
        member.skip()
        start += member.num_packed
        packed = member.rest or file.read(_READ_BYTES)


def find_warc_member(file: BinaryIO, start: int, stop: int | None = None) -> int | None:
    """Give where the first member with a WARC record begins from `start` on and before `stop`; None where there is none."""
    return next((place for place in _scan(file, _GZIP, start, stop) if _begins_record(file, place)), None)


def _begins_record(file: BinaryIO, start: int) -> bool:
    """Tell whether members with records follow each other from here, to the end of the file or further than a stored block."""
    file.seek(start)
    packed, num_packed = file.read(_READ_BYTES), 0
    while packed and num_packed <= _MAX_STORED:
        member = GzipMember(file, packed)
        if b"".join(member.read(1) for _ in _RECORD) != _RECORD:
            return False
        while num_packed + member.num_packed <= _MAX_STORED and member.read():
            pass
        if member.error is not None:
            return False
        num_packed += member.num_packed
        packed = member.rest or file.read(_READ_BYTES)
    return True


def find_bz2_stream(file: BinaryIO, start: int, stop: int | None = None) -> int | None:
    """Give where the first stream that is not empty begins from `start` on and before `stop`; None where there is none."""
    return next(_scan(file, _BZ2, start, stop), None)


def _scan(file: BinaryIO, magic: re.Pattern[bytes], start: int, stop: int | None) -> Iterator[int]:
    """Yield the places of some bytes, none more than _MAX_MAGIC long, that begin from `start` on and before `stop`."""
    for first in count(start, _SCAN_BYTES):
        file.seek(first)
        window = file.read(_SCAN_BYTES + _MAX_MAGIC - 1)
        for found in magic.finditer(window):
            if found.start() < _SCAN_BYTES and (stop is None or first + found.start() < stop):
                yield first + found.start()
        if len(window) < _SCAN_BYTES or (stop is not None and first + _SCAN_BYTES >= stop):
            return


def read_bz2(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield what the streams hold from the one on that begins at `start`, each piece with where its stream begins.

    Raises:
        EOFError: the file is cut.
        OSError: it is damaged.
    """
    if start:
        file.seek(start)
    place, packed = start, file.read(_READ_BYTES)
    while packed.startswith(b"BZh") or place == start:  # what else follows a stream is left, as bzip2 does
        unpacked, num_packed = bz2.BZ2Decompressor(), 0
        while not unpacked.eof:
            if unpacked.needs_input:
                packed = packed or file.read(_READ_BYTES)
                if not packed:
                    raise EOFError("compressed file ended before the end of its last stream")
            num_packed += len(packed)
            text, packed = unpacked.decompress(packed, _SCAN_BYTES), b""
            yield place, text
        place += num_packed - len(unpacked.unused_data)
        packed = unpacked.unused_data
        if len(packed) < _MAX_MAGIC:
            packed += file.read(_READ_BYTES)
