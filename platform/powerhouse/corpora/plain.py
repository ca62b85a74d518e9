"""Plain text: lines with their places, and chunks of them.

A large file is read in pieces by several workers, which must find the same chunks as one that reads it all. So a text is cut,
whoever reads it, at the first line that begins in each section of 16 MB, and pieces are whole sections.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from powerhouse.corpora.chunks import split_chunks
from powerhouse.corpora.document import RawDocument
from powerhouse.errors import InputError

SECTION_BYTES = 2**24
MAX_LINE_BYTES = 1_000_000
"""A longer line is cut here."""
_BREAK = re.compile(r"\r\n?")
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def read_plain(file: BinaryIO, location: str, chunk_chars: int, first: int, last: int | None) -> Iterator[RawDocument]:
    """Yield the chunks of the lines that begin from byte `first` on and before `last`, each at the byte where it begins.

    Raises:
        InputError: it is no text.
        UnicodeDecodeError: it is not UTF-8.
    """
    with_section = _lines(file, seek_line(file, first), last)
    for _, lines in groupby(with_section, key=itemgetter(0)):
        for offset, chunk in split_chunks((line[1:] for line in lines), chunk_chars):
            if "\0" in chunk:
                raise InputError(f"{location}: not a text: it holds a NUL byte", got=f"after byte {offset}")
            yield RawDocument(offset, "text", chunk)


def seek_line(file: BinaryIO, first: int) -> int:
    """Go to the first line that begins at or after a byte; give where that is."""
    if first == 0:
        return 0
    file.seek(first - 1)
    skipped = 0
    while part := file.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return first - 1 + skipped


def _lines(file: BinaryIO, offset: int, last: int | None) -> Iterator[tuple[int, int, str]]:
    """Yield the lines: the section in which each begins, the byte, and the text, with every kind of line break a plain one."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # keeps the half of a character at which a long line was cut
    begin, is_inside = offset, False
    while (last is None or offset < last or is_inside) and (line := file.readline(MAX_LINE_BYTES)):
        begin = begin if is_inside else offset
        text = decoder.decode(line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line)
        place = offset
        for part in _LINES.findall(text) if "\r" in text else [text]:
            yield begin // SECTION_BYTES, place, _BREAK.sub("\n", part) if "\r" in part else part
            place += len(part.encode())
        offset += len(line)
        is_inside = not line.endswith(b"\n")
    decoder.decode(b"", final=True)
