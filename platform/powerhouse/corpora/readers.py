"""Files in, raw documents out: plain text in chunks, HTML by page, MediaWiki XML dumps by page, each also .gz or .bz2.

A plain text is a book, too coarse a document for deduplication and for the train/held-out split, so it is cut at blank lines.
Which blank lines depends on the text around them alone (content-defined chunking, Muthitacharoen et al. 2001): two editions
of one book, one with a longer preface, fall into the same chunks after it.
"""

from __future__ import annotations

import bz2
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import xxhash
from lxml import etree

from powerhouse.corpora.document import RawDocument, Rejection
from powerhouse.errors import InputError

_OPENERS: dict[str, Callable[[Path], object]] = {".gz": gzip.open, ".bz2": bz2.open}
_HTML_ELEMENT = re.compile(r"<[a-zA-Z!][^<>]*>")


def reader_of(path: Path) -> Callable[[Path, int], Iterator[RawDocument]]:
    """Return the reader for a file's name.

    Raises:
        InputError: no reader knows the ending.
    """
    ending = path.with_suffix("").suffix if path.suffix in _OPENERS else path.suffix
    ending = ending.partition("-")[0]  # Wikipedia names the parts of its dumps articles1.xml-p1p41242.bz2
    if ending not in _READERS:
        allowed = ", ".join(_READERS) + ", each also with .gz or .bz2"
        raise InputError(f"{path}: no reader for this kind of file", got=path.suffix, allowed=allowed, do="narrow the glob")
    return _READERS[ending]


def read_documents(path: Path, chunk_chars: int) -> Iterator[RawDocument]:
    """Yield the documents of one file, in its order.

    Raises:
        InputError: the file is cut short, not UTF-8, or not what its name says.
    """
    with _damage_named(path):
        yield from reader_of(path)(path, chunk_chars)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    do = "fetch the file again, or leave it out with the glob"
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8", got=f"{error.reason} at byte {error.start}", do="convert it to UTF-8") from None
    except etree.XMLSyntaxError as error:
        raise InputError(f"{path}: not well-formed XML", got=error.msg, do=do) from None
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: truncated or damaged", got=error, do=do) from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, _OPENERS[path.suffix](path) if path.suffix in _OPENERS else path.open("rb"))


def _read_text(path: Path) -> str:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    if "\0" in text:
        raise InputError(f"{path}: not a text: it holds a NUL byte", got=f"at character {text.index(chr(0))}")
    return text.replace("\r\n", "\n")


def _read_plain(path: Path, chunk_chars: int) -> Iterator[RawDocument]:
    for offset, chunk in split_chunks(_read_text(path), chunk_chars):
        yield RawDocument(offset, "text", chunk)


def split_chunks(text: str, chunk_chars: int) -> Iterator[tuple[int, str]]:
    """Cut a text into chunks of about `chunk_chars` characters; yield each with its offset.

    From half that size on, a line break at a blank line is a cut with a chance, by the hash of the line before it, that makes
    the mean come out; from twice that size on, every line break is a cut. Only a longer single line makes a longer chunk.
    """
    start = end = blank_start = 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        length = end - start
        paragraph_chars = end - blank_start
        is_blank = not line.strip()
        is_cut = is_blank and length >= chunk_chars // 2 and _is_cut(text[blank_start:end], paragraph_chars, chunk_chars // 2)
        if is_cut or length >= 2 * chunk_chars:
            yield start, text[start:end]
            start = end
        if is_blank:
            blank_start = end
    if end > start:
        yield start, text[start:end]


def _is_cut(paragraph: str, paragraph_chars: int, mean_chars: int) -> bool:
    """Say yes with chance paragraph_chars / mean_chars, decided by the paragraph's own text."""
    return xxhash.xxh3_64_intdigest(paragraph.encode()) < 2**64 * paragraph_chars / mean_chars


def _read_html(path: Path, _: int) -> Iterator[RawDocument]:
    content = _read_text(path)
    if not _HTML_ELEMENT.search(content):
        raise InputError(f"{path}: not HTML: it has no element", got=repr(content[:60]), do="leave it out with the glob")
    yield RawDocument(0, "html", content)


def _read_dump(path: Path, _: int) -> Iterator[RawDocument]:
    num_pages = 0
    with _open(path) as file:
        events = etree.iterparse(file, tag="{*}page", resolve_entities=False, no_network=True, huge_tree=True)
        for _event, page in events:
            num_pages += 1
            yield _page(page)
            page.clear()
            while page.getprevious() is not None:
                del page.getparent()[0]
    if not num_pages:
        raise InputError(f"{path}: not a MediaWiki dump: it has no <page>", do="leave it out with the glob")


def _page(page: etree._Element) -> RawDocument:
    rejection = None
    if page.find("{*}redirect") is not None:
        rejection = Rejection("redirect")
    elif (namespace := page.findtext("{*}ns", "0")) != "0":
        rejection = Rejection("not_an_article", f"namespace {namespace}")
    text = page.findtext("{*}revision/{*}text") or ""
    return RawDocument(int(page.findtext("{*}id", "0")), "wikitext", text, rejection)


_READERS: dict[str, Callable[[Path, int], Iterator[RawDocument]]] = {
    ".txt": _read_plain,
    ".html": _read_html,
    ".htm": _read_html,
    ".xml": _read_dump,
}
