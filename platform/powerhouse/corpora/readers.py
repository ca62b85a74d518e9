"""Files in, raw documents out: plain text in chunks, records of tables, web pages, MediaWiki dumps, books as epub.

Every reader is a stream: no file is ever whole in memory, but for a single web page or chapter. Several workers read pieces of
a large .txt, .jsonl, .parquet, .xml, .xml.bz2 or .warc.gz; any other file is one worker's stream. A bad record is a document
with a rejection; a file that is damaged, or not what its name says, is an error, told after what could be read of it.
"""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
from lxml import etree

from powerhouse.corpora.archives import read_epub, read_warc
from powerhouse.corpora.document import RawDocument, Rejection
from powerhouse.corpora.dumps import read_dump
from powerhouse.corpora.opening import COMPRESSED, ending_of, open_binary
from powerhouse.corpora.pages import MAX_PAGE_BYTES, check_page
from powerhouse.corpora.plain import read_plain, seek_line
from powerhouse.errors import InputError

MAX_RECORD_BYTES = 2**25
"""A longer record of a table is left out."""
_PARQUET_BATCH = 256


@dataclass(frozen=True)
class ReadOptions:
    """What a reader needs to know besides the file."""

    chunk_chars: int = 4000
    text_column: str = "text"
    first: int = 0
    """First byte, or row group of a .parquet, of the piece to read."""
    last: int | None = None
    """The one after its last; None for all."""


def kind_of(location: str | Path) -> str:
    """Give the ending that chooses the reader: .xml for articles1.xml-p1p41242.bz2 too, as Wikipedia names parts of a dump."""
    return ending_of(location).partition("-")[0]


Reader = Callable[[str, ReadOptions], Iterator[RawDocument]]


def reader_of(location: str | Path) -> Reader:
    """Return the reader for a file's name.

    Raises:
        InputError: no reader knows the ending.
    """
    ending = kind_of(location)
    if ending not in _READERS:
        allowed = f"{', '.join(_READERS)}, each but .epub and .parquet also with {', '.join(COMPRESSED)}"
        raise InputError(f"{location}: no reader for this kind of file", got=ending, allowed=allowed, do="narrow the glob")
    return _READERS[ending]


def read_documents(location: str | Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Yield the documents of one file, in its order.

    Raises:
        InputError: the file is cut short, not UTF-8, or not what its name says.
    """
    with _damage_named(str(location)):
        yield from reader_of(location)(str(location), options)


@contextmanager
def _damage_named(location: str) -> Iterator[None]:
    do = "fetch the file again, or leave it out with the glob"
    try:
        yield
    except UnicodeDecodeError as error:
        what = f"{location}: not UTF-8"
        raise InputError(what, got=f"{error.reason} at byte {error.start}", do="convert it to UTF-8") from None
    except etree.XMLSyntaxError as error:
        raise InputError(f"{location}: not well-formed XML", got=error.msg, do=do) from None
    except (PermissionError, FileNotFoundError, _http().ClientResponseError) as error:
        what = f"{location}: not there, or no right to read it"
        raise InputError(what, got=error, do="give this process the right, or leave it out with the glob") from None
    except (EOFError, zlib.error, OSError, zipfile.BadZipFile, pa.ArrowException, csv.Error, _http().ClientError) as error:
        raise InputError(f"{location}: truncated or damaged", got=error, do=do) from None


def _http() -> ModuleType:
    import aiohttp  # 0.2 s in every worker, and only what has failed needs the errors of HTTP

    return aiohttp


def _open_text(location: str, newline: str | None = None) -> TextIOWrapper:
    return TextIOWrapper(open_binary(location), encoding="utf-8-sig", newline=newline)


def _read_plain(location: str, options: ReadOptions) -> Iterator[RawDocument]:
    with open_binary(location) as file:
        yield from read_plain(file, location, options.chunk_chars, options.first, options.last)


def _read_jsonl(location: str, options: ReadOptions) -> Iterator[RawDocument]:
    """Read one JSON object a line; a piece is the lines that begin in it."""
    with open_binary(location) as file:
        offset = seek_line(file, options.first)
        while (options.last is None or offset < options.last) and (line := file.readline(MAX_RECORD_BYTES)):
            num_bytes = len(line)
            is_whole = num_bytes < MAX_RECORD_BYTES or line.endswith(b"\n")
            while not is_whole and (rest := file.readline(MAX_RECORD_BYTES)):
                num_bytes += len(rest)
                if rest.endswith(b"\n"):
                    break
            if line.strip():
                yield _record(offset, line, options.text_column) if is_whole else _bad(offset, f"{num_bytes:,} bytes long")
            offset += num_bytes


def _record(offset: int, line: bytes, column: str) -> RawDocument:
    try:
        value = json.loads(line.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return _bad(offset, f"not a JSON object: {error}", line[:200].decode(errors="replace"))
    if not isinstance(value, dict) or not isinstance(value.get(column), str):
        return _bad(offset, f"no text in {column!r}", line[:200].decode(errors="replace"))
    url = value["url"] if isinstance(value.get("url"), str) else None
    text = value[column].encode(errors="replace").decode()  # an escape may be half a character
    return RawDocument(offset, "text", text, url=url.encode(errors="replace").decode() if url else None)


def _bad(offset: int, why: str, shown: str = "") -> RawDocument:
    return RawDocument(offset, "text", shown, Rejection("bad_record", why))


def _read_csv(location: str, options: ReadOptions) -> Iterator[RawDocument]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    delimiter = "\t" if ending_of(location) == ".tsv" else ","
    with _open_text(location, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(rows, [])
        _check_column(location, options.text_column, header)
        column, url = header.index(options.text_column), header.index("url") if "url" in header else None
        for number, row in enumerate(rows):
            if len(row) == len(header):
                yield RawDocument(number, "text", row[column], url=row[url] or None if url is not None else None)
            elif row:
                yield _bad(number, f"{len(row)} fields, the header has {len(header)}", " ".join(row)[:200])


def _check_column(location: str, column: str, there: list[str]) -> None:
    if column not in there:
        do = "set the source's text_column"
        raise InputError(f"{location}: no column {column!r}", got=", ".join(there) or "no column at all", do=do)


def _read_parquet(location: str, options: ReadOptions) -> Iterator[RawDocument]:
    with open_binary(location) as source, pq.ParquetFile(source) as file:
        column = options.text_column
        _check_column(location, column, file.schema_arrow.names)
        if not pa.types.is_string(kind := file.schema_arrow.field(column).type) and not pa.types.is_large_string(kind):
            raise InputError(f"{location}: column {column!r} holds no text", got=kind, allowed="string")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = range(file.num_row_groups)[options.first : options.last]
        number = sum(sizes[: options.first])
        has_url = "url" in file.schema_arrow.names and pa.types.is_string(file.schema_arrow.field("url").type)
        names = [column, "url"] if has_url else [column]
        for batch in file.iter_batches(_PARQUET_BATCH, row_groups=list(groups), columns=names):
            urls = batch["url"].to_pylist() if has_url else [None] * batch.num_rows
            for text, url in zip(batch[column].to_pylist(), urls, strict=True):
                yield _bad(number, f"no text in {column!r}") if text is None else RawDocument(number, "text", text, url=url)
                number += 1


def _read_html(location: str, _: ReadOptions) -> Iterator[RawDocument]:
    with open_binary(location) as file:
        content = file.read(MAX_PAGE_BYTES + 1)
    yield check_page(location, content)


_READERS: dict[str, Reader] = {
    ".txt": _read_plain,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".html": _read_html,
    ".htm": _read_html,
    ".warc": lambda location, options: read_warc(location, options.first, options.last),
    ".epub": lambda location, _: read_epub(location),
    ".xml": lambda location, options: read_dump(location, options.first, options.last),
}
