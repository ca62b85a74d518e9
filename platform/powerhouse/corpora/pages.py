"""Bytes of a web page in, its document out."""

from __future__ import annotations

import re

from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from powerhouse.corpora.document import RawDocument, Rejection
from powerhouse.errors import InputError

MAX_PAGE_BYTES = 10 * 2**20
"""A larger page is left out: its extraction runs in one go, and cannot be told to stop."""
_HTML_ELEMENT = re.compile(r"<[a-zA-Z!][^<>]{0,10000}>")


def check_page(location: str, content: bytes) -> RawDocument:
    """Give the page that is a file of its own.

    Raises:
        InputError: it is not UTF-8, or not HTML.
    """
    if len(content) > MAX_PAGE_BYTES:
        return _too_large(0, len(content))
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    if "\0" in text:
        raise InputError(f"{location}: not a text: it holds a NUL byte", got=f"at character {text.index(chr(0))}")
    if not _HTML_ELEMENT.search(text):
        raise InputError(f"{location}: not HTML: it has no element", got=repr(text[:60]), do="leave it out with the glob")
    return RawDocument(0, "html", text)


def decode_page(offset: int, content: bytes, charset: str | None) -> RawDocument:
    """Give a page that came over HTTP, in the encoding that its header tells, else in the one that it looks like."""
    if len(content) > MAX_PAGE_BYTES:
        return _too_large(offset, len(content))
    encoding = str(charset or detect_encoding(content, html5_compatible=True))
    text = str(bytes_to_str(content, encoding, fallback_encodings=("utf-8", "windows-1252")))
    if not _HTML_ELEMENT.search(text):
        return RawDocument(offset, "text", text[:200], Rejection("bad_record", "not HTML: it has no element"))
    return RawDocument(offset, "html", text)


def _too_large(offset: int, num_bytes: int) -> RawDocument:
    return RawDocument(offset, "html", "", Rejection("page_too_large", f"over {min(num_bytes, MAX_PAGE_BYTES):,} bytes"))
