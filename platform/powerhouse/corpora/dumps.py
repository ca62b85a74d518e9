"""Dumps of a MediaWiki, such as Wikipedia: pages in one XML file, packed as one .bz2 stream or as many.

Workers read pieces of what is not packed, or is packed as many streams. A page is of the piece in which its tag begins; its end
may stand in the next one, whose reader passes over what is before its own first tag. Tags are looked for as bytes: MediaWiki
writes UTF-8, and neither comments nor CDATA, where one might stand that is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from lxml import etree

from powerhouse.corpora.document import RawDocument, Rejection
from powerhouse.corpora.members import find_bz2_stream, read_bz2
from powerhouse.corpora.opening import check_ratio, open_binary, open_raw
from powerhouse.errors import InputError

_PAGE = re.compile(rb"<page[\s/>]")
_MAX_PART = 5
"""A tag of which no more is there is not found."""
_READ_BYTES = 2**18
_ROOT = b"<mediawiki>"


def read_dump(location: str, first: int, last: int | None) -> Iterator[RawDocument]:
    """Yield the pages whose tags begin in the piece, each with its page id as its place.

    A piece are the streams of a .bz2 that begin from byte `first` on and before `last`, or the bytes themselves.

    Raises:
        InputError: it has no page.
    """
    parser = etree.XMLPullParser(["end"], tag="{*}page", resolve_entities=False, no_network=True, huge_tree=True)
    num_pages, before, is_inside = 0, b"", first == 0
    for text, num_begun in _count_tags(_read(location, first, last), last):
        if num_pages == num_begun:
            return
        if not is_inside:
            found = _PAGE.search(before + text)
            if found is None:
                before = (before + text)[-_MAX_PART:]
                continue
            text, is_inside = _ROOT + (before + text)[found.start() :], True
        parser.feed(text)
        for _event, page in parser.read_events():
            if num_pages == num_begun:
                return
            num_pages += 1
            yield _page(page)
            page.clear()
            while page.getprevious() is not None:
                del page.getparent()[0]
    if is_inside:
        parser.close()
    if first == 0 and not num_pages:
        raise InputError(f"{location}: not a MediaWiki dump: it has no <page>", do="leave it out with the glob")


def _count_tags(chunks: Iterator[tuple[int, bytes]], last: int | None) -> Iterator[tuple[bytes, int | None]]:
    """Yield the text, and, with what stands after the piece, how many pages begin in it."""
    num_begun, end, after = 0, b"", b""
    for place, text in chunks:
        if last is None or place < last:
            num_begun += len(_PAGE.findall(end + text))
            end = (end + text)[-_MAX_PART:]
            yield text, None
        else:
            after += text
            if len(after) >= _MAX_PART:
                break
    num_begun += len(_PAGE.findall(end + after[:_MAX_PART]))  # a tag of which a part stands in the piece
    if after:
        yield after, num_begun
    for _, text in chunks:
        yield text, num_begun


def _read(location: str, first: int, last: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes, unpacked, from the beginning of the piece to the end of the file, with their places in it."""
    if PurePosixPath(location.lower()).suffix == ".bz2":
        yield from _read_streams(location, first)
        return
    with open_binary(location) as file:
        place = file.seek(first) if first else 0
        while text := file.read(_READ_BYTES if last is None or place >= last else min(_READ_BYTES, last - place)):
            yield place, text
            place += len(text)


def _read_streams(location: str, first: int) -> Iterator[tuple[int, bytes]]:
    with open_raw(location) as file:
        start = find_bz2_stream(file, first) if first else 0
        num_bytes = 0
        for place, text in read_bz2(file, start) if start is not None else ():
            num_bytes += len(text)
            check_ratio(location, file.tell() - (start or 0), num_bytes)
            yield place, text


def _page(page: etree._Element) -> RawDocument:
    rejection = None
    if page.find("{*}redirect") is not None:
        rejection = Rejection("redirect")
    elif (namespace := page.findtext("{*}ns", "0")) != "0":
        rejection = Rejection("not_an_article", f"namespace {namespace}")
    text = page.findtext("{*}revision/{*}text") or ""
    return RawDocument(int(page.findtext("{*}id", "0")), "wikitext", text, rejection)
