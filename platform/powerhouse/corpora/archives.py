"""Files that hold many web pages: WARC (ISO 28500), what crawlers write, and EPUB, in which a book is a zip of chapters."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO
from urllib.parse import unquote

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from lxml import etree

from powerhouse.corpora.document import RawDocument, Rejection
from powerhouse.corpora.members import GzipMember, find_warc_member, read_members
from powerhouse.corpora.opening import check_ratio, open_raw
from powerhouse.corpora.pages import MAX_PAGE_BYTES, decode_page
from powerhouse.errors import InputError

_HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_warc(location: str, first: int, last: int | None) -> Iterator[RawDocument]:
    """Yield the HTML responses of a .warc or .warc.gz, each at the byte where its record starts in the file.

    Of a .warc.gz, in which each record is a member, a piece may be read: the members that begin from byte `first` on and before
    `last`. In a member of several records the others count on from where it begins.
    """
    num_records = 0
    with open_raw(location) as file:
        is_packed = location.lower().endswith(".gz")
        for start, stream in _members(file, first, last) if is_packed else [(None, file)]:
            for number, record in enumerate(ArchiveIterator(stream, record_types=WarcRecordType.any_type, parse_http=True)):
                num_records += 1
                place = record.stream_pos if start is None else start + number
                if record.record_type == WarcRecordType.response and (page := _response(place, record)):
                    yield page
    if not num_records and first == 0:
        raise InputError(f"{location}: not a WARC file: it has no record", do="leave it out with the glob")


def _members(file: BinaryIO, first: int, last: int | None) -> Iterator[tuple[int, GzipMember]]:
    """Yield the members that begin in the piece, each with its place.

    Raises:
        OSError: they do not end where the reader of the next piece will begin.
    """
    start = find_warc_member(file, first) if first else 0
    if start is None:
        return
    if first:
        file.seek(start)
    for place, member in read_members(file, start, last):
        yield place, member
        member.skip()
        start = place + member.num_packed
    if last is not None:
        file.seek(start)
        following = start if file.read(1) else None
        if find_warc_member(file, last) != following:
            raise OSError(f"the records do not follow each other around byte {last}")


def _response(offset: int, record: WarcRecord) -> RawDocument | None:
    """Give the page of a response; a document with a rejection for a broken one, nothing for a picture or an error page."""
    num_expected = record.content_length
    content = record.reader.read(MAX_PAGE_BYTES + 1)
    if len(content) < min(num_expected, MAX_PAGE_BYTES + 1) or record.http_headers is None:
        why = f"{len(content):,} of {num_expected:,} bytes" if record.http_headers is not None else "no HTTP header"
        return RawDocument(offset, "text", "", Rejection("bad_record", f"WARC record cut short: {why}"))
    if record.http_headers.status_code != 200 or record.http_content_type not in _HTML_TYPES:
        return None
    page = decode_page(offset, content, record.http_charset)
    return replace(page, url=record.headers.get("WARC-Target-URI"))


def read_epub(location: str) -> Iterator[RawDocument]:
    """Yield the chapters of a book in its reading order, each at its place in that order."""
    with open_raw(location) as file, zipfile.ZipFile(file) as book:
        for info in book.infolist():
            check_ratio(f"{location}: {info.filename}", info.compress_size, info.file_size)
        for place, name in enumerate(_spine(location, book)):
            with book.open(name) as chapter:
                yield decode_page(place, chapter.read(MAX_PAGE_BYTES + 1), None)


def _spine(location: str, book: zipfile.ZipFile) -> list[str]:
    """Give the names of the chapters, after META-INF/container.xml and the package file that it names (EPUB 3.3, section 5)."""
    try:
        container = _parse(book, "META-INF/container.xml")
        package = container.xpath("string(//*[local-name()='rootfile']/@full-path)")
        root = _parse(book, str(package))
        hrefs = {item.get("id"): item.get("href") for item in root.iter("{*}item")}
        places = [hrefs[item.get("idref")] for item in root.iter("{*}itemref")]
        names = [posixpath.normpath(posixpath.join(posixpath.dirname(str(package)), unquote(place))) for place in places]
        return [book.getinfo(name).filename for name in names]
    except KeyError as error:
        raise InputError(
            f"{location}: not an EPUB book", got=f"nothing found for {error}", do="leave it out with the glob"
        ) from None


def _parse(book: zipfile.ZipFile, name: str) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    with book.open(name) as file:
        return etree.fromstring(file.read(MAX_PAGE_BYTES), parser)
