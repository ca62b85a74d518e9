from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pytest

from powerhouse.corpora.readers import read_documents, split_chunks
from powerhouse.errors import InputError

PAGE = "<html><body><p>Hello there.</p></body></html>"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>A</title><ns>0</ns><id>10</id><redirect title="B" /><revision><text>#REDIRECT [[B]]</text></revision></page>
<page><title>B</title><ns>0</ns><id>11</id><revision><text>'''B''' is a letter, être.</text></revision></page>
<page><title>Talk:B</title><ns>1</ns><id>12</id><revision><text>Is it?</text></revision></page>
</mediawiki>"""


def paragraphs(first: int, last: int) -> str:
    return "".join(f"Paragraph {number} says {number * number}.\nIt has a second line.\n\n" for number in range(first, last))


@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress])
def test_every_kind_of_file_is_read_plain_and_compressed(tmp_path: Path, compress) -> None:
    ending = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[compress]
    expected = {"a.txt": ("text", "Être.\nTwo."), "a.html": ("html", PAGE), "a.xml": ("wikitext", "'''B''' is a letter, être.")}
    for (name, (markup, content)), raw in zip(expected.items(), ["Être.\r\nTwo.", PAGE, DUMP], strict=True):
        path = tmp_path / (name + ending)
        path.write_bytes(compress(raw.encode()) if compress else raw.encode())
        kept = [document for document in read_documents(path, 1000) if not document.rejection]
        assert [(document.markup, document.content) for document in kept] == [(markup, content)]


def test_a_part_of_a_wikipedia_dump_is_known_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "enwiki-latest-pages-articles1.xml-p1p41242.bz2"
    path.write_bytes(bz2.compress(DUMP.encode()))
    found = [(page.offset, page.rejection and page.rejection.reason) for page in read_documents(path, 1000)]
    assert found == [(10, "redirect"), (11, None), (12, "not_an_article")]


def test_chunks_join_to_the_text_and_stand_at_their_offsets() -> None:
    text = paragraphs(0, 400)
    chunks = list(split_chunks(text, 1000))
    assert "".join(chunk for _, chunk in chunks) == text
    assert all(text.startswith(chunk, offset) for offset, chunk in chunks)
    lengths = [len(chunk) for _, chunk in chunks[:-1]]
    assert min(lengths) >= 500
    assert max(lengths) < 2000 + 60
    assert 700 < sum(lengths) / len(lengths) < 1300


def test_a_text_without_blank_lines_is_cut_at_line_breaks_and_a_single_line_never() -> None:
    lines = [chunk for _, chunk in split_chunks("a line of verse\n" * 1000, 800)]
    assert all(chunk.endswith("\n") and len(chunk) <= 1616 for chunk in lines)
    assert len(list(split_chunks("x" * 10_000, 800))) == 1


def test_two_editions_with_other_prefaces_fall_into_the_same_chunks_after_a_while() -> None:
    text = paragraphs(100, 500)
    plain = {chunk for _, chunk in split_chunks(text, 1000)}
    prefaced = {chunk for _, chunk in split_chunks(paragraphs(0, 7) + text, 1000)}
    assert len(plain & prefaced) >= 0.7 * len(plain)


GZ = gzip.compress(b"some words\n" * 1000)
BZ2 = bz2.compress(DUMP.encode())
BAD_FILES = [
    ("cut.txt.gz", GZ[: len(GZ) // 2], "truncated or damaged"),
    ("damaged.txt.gz", GZ[:30] + b"\xff\xff\xff" + GZ[33:], "truncated or damaged"),
    ("not.txt.gz", b"this was never compressed", "truncated or damaged"),
    ("cut.txt.bz2", bz2.compress(b"some words\n" * 1000)[:40], "truncated or damaged"),
    ("cut.xml.bz2", BZ2[: len(BZ2) // 2], "truncated or damaged"),
    ("latin1.txt", "naïve".encode("latin-1"), "not UTF-8"),
    ("latin1.html", PAGE.replace("Hello", "Naïve").encode("latin-1"), "not UTF-8"),
    ("binary.txt", b"ab\0cd", "it holds a NUL byte"),
    ("binary.html", PAGE.encode() + b"\0", "it holds a NUL byte"),
    ("no.html", b"just words, 1 < 2 > 0", "not HTML: it has no element"),
    ("empty.html", b"", "not HTML: it has no element"),
    ("cut.xml", DUMP[: len(DUMP) // 2].encode(), "not well-formed XML"),
    ("other.xml", b"<feed><entry>x</entry></feed>", "it has no <page>"),
    ("paper.pdf", b"%PDF-1.7", "no reader for this kind of file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(path, 1000))
    assert name in str(caught.value)
