from __future__ import annotations

import bz2
import gzip
import http.server
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from powerhouse.corpora import opening, plain, sources
from powerhouse.corpora.chunks import split_chunks
from powerhouse.corpora.document import RawDocument
from powerhouse.corpora.readers import ReadOptions, read_documents
from powerhouse.corpora.sources import SourceConfig, list_files
from powerhouse.errors import InputError
from raw_files import epub, paragraphs, parquet, warc_record, write, zstandard

PAGE = "<html><body><p>Hello there.</p></body></html>"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>A</title><ns>0</ns><id>10</id><redirect title="B" /><revision><text>#REDIRECT [[B]]</text></revision></page>
<page><title>B</title><ns>0</ns><id>11</id><revision><text>'''B''' is a letter, être.</text></revision></page>
<page><title>Talk:B</title><ns>1</ns><id>12</id><revision><text>Is it?</text></revision></page>
</mediawiki>"""
JSONL = '{"text": "Être."}\n{"text": "Two.", "more": 1}\n\n'
CSV = 'id,text\n1,"Être, ""so"" to say.\nA second line."\n2,Two.\n'


def read(path: Path, **options: object) -> list[RawDocument]:
    return list(read_documents(path, ReadOptions(chunk_chars=1000, **options)))  # type: ignore[arg-type]


def outcome(documents: list[RawDocument]) -> list[tuple[int, str, str | None]]:
    return [(item.offset, item.content, item.rejection.reason if item.rejection else None) for item in documents]


def lines_of(text: str) -> list[tuple[int, str]]:
    """Give the lines, each with the character at which it begins."""
    lines = text.splitlines(keepends=True)
    return list(zip(accumulate(map(len, lines), initial=0), lines, strict=False))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard,
}
PLAIN = {
    "a.txt": ("Être.\r\nTwo.", [(0, "Être.\nTwo.", None)]),
    "a.html": (PAGE, [(0, PAGE, None)]),
    "a.xml": (
        DUMP,
        [(10, "#REDIRECT [[B]]", "redirect"), (11, "'''B''' is a letter, être.", None), (12, "Is it?", "not_an_article")],
    ),
    "a.jsonl": (JSONL, [(0, "Être.", None), (19, "Two.", None)]),
    "a.csv": (CSV, [(0, 'Être, "so" to say.\nA second line.', None), (1, "Two.", None)]),
    "a.tsv": ("text\tid\nTwo.\t1\n", [(0, "Two.", None)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_every_kind_of_file_is_read_plain_and_compressed(tmp_path: Path, name: str, ending: str) -> None:
    content, expected = PLAIN[name]
    path = write(tmp_path / (name + ending), COMPRESSIONS[ending](content.encode()))

    assert outcome(read(path)) == expected


def test_parquet_gives_a_document_a_row_and_a_null_is_a_reject(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", parquet(["Être.", None, "Two."]))

    assert outcome(read(path)) == [(0, "Être.", None), (1, "", "bad_record"), (2, "Two.", None)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_warc_gives_its_pages_and_a_reject_for_a_record_cut_short(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    latin = "<html><p>naïve</p></html>".encode("latin-1")
    records = [
        warc_record("http://a/", PAGE.encode()),
        warc_record("http://a/x.png", b"\x89PNG", kind="image/png"),
        warc_record("http://a/404", PAGE.encode(), status=404),
        warc_record("http://a/latin", latin, kind="text/html; charset=iso-8859-1"),
        warc_record("http://a/guess", latin, kind="text/html"),
        warc_record("http://a/words", b"just words"),
    ]
    parts = [compress(record) for record in records]
    cut = compress(warc_record("http://a/cut", PAGE.encode())[:-30])
    ending = ".gz" if compress is gzip.compress else ""
    found = read(write(tmp_path / f"a.warc{ending}", b"".join([*parts, cut])))
    starts = [sum(map(len, parts[:number])) for number in (0, 3, 4, 5, 6)]

    assert [(item.offset, item.rejection.reason if item.rejection else item.content) for item in found] == list(
        zip(starts, [PAGE, "<html><p>naïve</p></html>", "<html><p>naïve</p></html>", "bad_record", "bad_record"], strict=True)
    )


def test_an_epub_gives_its_chapters_in_reading_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.epub", epub({"one": b"<html><p>1</p></html>", "two": b"<html><p>2</p></html>"}))

    assert outcome(read(path)) == [(0, "<html><p>2</p></html>", None), (1, "<html><p>1</p></html>", None)]


def test_a_part_of_a_wikipedia_dump_is_known_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "enwiki-latest-pages-articles1.xml-p1p41242.bz2", bz2.compress(DUMP.encode()))

    assert [item.offset for item in read(path)] == [10, 11, 12]


BAD_LINES = {
    b"not json": "not a JSON object: Expecting value",
    b"[1, 2]": "no text in 'text'",
    b'{"other": "x"}': "no text in 'text'",
    b'{"text": 5}': "no text in 'text'",
    b'{"text": "na\xefve"}': "not a JSON object: 'utf-8' codec",
    b"[" * 100_000: "not a JSON object: maximum recursion depth",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:10].decode(errors="replace"))
def test_a_bad_line_is_a_reject_and_the_next_is_read(tmp_path: Path, line: bytes) -> None:
    bad, good = read(write(tmp_path / "a.jsonl", line + b'\n{"text": "Good."}'))

    assert bad.rejection is not None
    assert bad.rejection.reason == "bad_record"
    assert bad.rejection.detail.startswith(BAD_LINES[line])
    assert (good.offset, good.content) == (len(line) + 1, "Good.")


def test_a_row_with_other_fields_than_the_header_is_a_reject(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"id,text\n1\n2,Two.\n3,Three.,x\n\n")

    assert outcome(read(path)) == [(0, "1", "bad_record"), (1, "Two.", None), (2, "3 Three. x", "bad_record")]


def test_half_a_character_in_an_escape_is_replaced(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", b'{"text": "a\\ud83d"}'))[0].content == "a?"


@pytest.mark.slow
def test_a_single_line_of_200_mb_is_cut_in_a_text_and_left_out_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    lengths = [len(item.content) for item in read_documents(path, ReadOptions())]
    assert (set(lengths), sum(lengths)) == ({plain.MAX_LINE_BYTES}, 200_000_000)

    path = path.rename(tmp_path / "a.jsonl")
    with path.open("ab") as file:
        file.write(b'\n{"text": "Good."}')
    bad, good = read(path)
    assert bad.rejection is not None
    assert bad.rejection.detail == "200,000,001 bytes long"
    assert (good.offset, good.content) == (200_000_001, "Good.")


def test_chunks_join_to_the_text_and_stand_at_their_offsets() -> None:
    text = paragraphs(0, 400)
    chunks = list(split_chunks(lines_of(text), 1000))
    assert "".join(chunk for _, chunk in chunks) == text
    assert all(text.startswith(chunk, offset) for offset, chunk in chunks)
    lengths = [len(chunk) for _, chunk in chunks[:-1]]
    assert min(lengths) >= 500
    assert max(lengths) < 2000 + 60
    assert 700 < sum(lengths) / len(lengths) < 1300


def test_a_text_without_blank_lines_is_cut_at_line_breaks_and_a_single_line_never() -> None:
    lines = [chunk for _, chunk in split_chunks(lines_of("a line of verse\n" * 1000), 800)]
    assert all(chunk.endswith("\n") and len(chunk) <= 1616 for chunk in lines)
    assert len(list(split_chunks(lines_of("x" * 10_000), 800))) == 1


def test_two_editions_with_other_prefaces_fall_into_the_same_chunks_after_a_while() -> None:
    text = paragraphs(100, 500)
    plain = {chunk for _, chunk in split_chunks(lines_of(text), 1000)}
    prefaced = {chunk for _, chunk in split_chunks(lines_of(paragraphs(0, 7) + text), 1000)}
    assert len(plain & prefaced) >= 0.7 * len(plain)


GZ = gzip.compress(b"some words\n" * 1000)
BZ2 = bz2.compress(DUMP.encode())
ZST = zstandard(b"some words\n" * 100_000)
WARC_GZ = gzip.compress(warc_record("http://a/", PAGE.encode()))
BAD_FILES = [
    ("cut.txt.gz", GZ[: len(GZ) // 2], "truncated or damaged"),
    ("damaged.txt.gz", GZ[:30] + b"\xff\xff\xff" + GZ[33:], "truncated or damaged"),
    ("not.txt.gz", b"this was never compressed", "truncated or damaged"),
    ("cut.txt.bz2", bz2.compress(b"some words\n" * 1000)[:40], "truncated or damaged"),
    ("cut.xml.bz2", BZ2[: len(BZ2) // 2], "truncated or damaged"),
    ("cut.txt.zst", ZST[: len(ZST) // 2], "truncated or damaged"),
    ("not.jsonl.zst", b"this was never compressed", "truncated or damaged"),
    ("latin1.txt", "naïve".encode("latin-1"), "not UTF-8"),
    ("latin1.html", PAGE.replace("Hello", "Naïve").encode("latin-1"), "not UTF-8"),
    ("latin1.csv", "text\nnaïve".encode("latin-1"), "not UTF-8"),
    ("binary.txt", b"ab\0cd", "it holds a NUL byte"),
    ("binary.html", PAGE.encode() + b"\0", "it holds a NUL byte"),
    ("no.html", b"just words, 1 < 2 > 0", "not HTML: it has no element"),
    ("empty.html", b"", "not HTML: it has no element"),
    ("cut.xml", DUMP[: len(DUMP) // 2].encode(), "not well-formed XML"),
    ("other.xml", b"<feed><entry>x</entry></feed>", "it has no <page>"),
    ("column.csv", b"id,body\n1,x\n", "no column 'text'\n  got: id, body\n  do: set the source's text_column"),
    ("empty.csv", b"", "no column 'text'\n  got: no column at all"),
    ("quote.csv", b'text\n"never closed', "truncated or damaged"),
    ("column.parquet", parquet([]).replace(b"text", b"body"), "no column 'text'"),
    ("cut.parquet", parquet(["one"])[:-20], "truncated or damaged"),
    ("cut.warc.gz", WARC_GZ[:40] + b"\xff\xff" + WARC_GZ[42:], "truncated or damaged"),
    ("not.warc", b"this is no WARC file\n" * 10, "truncated or damaged"),
    ("empty.warc", b"", "not a WARC file: it has no record"),
    ("not.epub", b"this is no zip", "truncated or damaged"),
    ("cut.epub", epub({"one": PAGE.encode()})[:-40], "truncated or damaged"),
    ("no-spine.epub", epub({}, package="<package><itemref idref='x'/></package>"), "not an EPUB book\n  got: nothing found"),
    ("paper.pdf", b"%PDF-1.7", "no reader for this kind of file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert message in str(caught.value)
    assert name in str(caught.value)


ZEROS = b"a" * 3_000_000
BOMBS = {
    "bomb.txt.gz": gzip.compress(ZEROS),
    "bomb.jsonl.bz2": bz2.compress(ZEROS),
    "bomb.txt.zst": zstandard(ZEROS),
    "bomb.epub": epub({"one": ZEROS}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_ratio(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "FREE_BYTES", 2**20)
    with pytest.raises(InputError, match=rf"(?s){name}.*unpacks to far more than text does.*allowed: 200 times"):
        read(write(tmp_path / name, BOMBS[name]))


class Files(http.server.SimpleHTTPRequestHandler):
    """A server that has one public and one private text."""

    def do_GET(self) -> None:
        content = {"/a.txt": b"Some words.", "/a.jsonl": JSONL.encode(), "/private.txt": None}.get(self.path)
        self.send_response(200 if content else 403)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_uri_is_read_and_one_without_the_right_is_one_error(server: str) -> None:
    assert outcome(list(read_documents(f"{server}/a.txt", ReadOptions()))) == [(0, "Some words.", None)]
    assert [item.content for item in read_documents(f"{server}/a.jsonl", ReadOptions())] == ["Être.", "Two."]
    with pytest.raises(InputError, match=r"private\.txt: not there, or no right to read it"):
        list(read_documents(f"{server}/private.txt", ReadOptions()))


def test_a_folder_behind_a_uri_is_listed_by_name_and_known_by_its_content() -> None:
    system = fsspec.filesystem("memory")
    system.pipe({"/texts/b.txt": b"Two.", "/texts/deep/a.txt.gz": gzip.compress(b"One."), "/texts/c.pdf": b""})
    source = SourceConfig(name="s", kind="other", path="memory://texts", glob="**/*.txt*")
    files = list_files([source])

    assert [file.relative for file in files] == ["b.txt", "deep/a.txt.gz"]
    assert [item.content for file in files for item in read_documents(file.location, file.options(1000))] == ["Two.", "One."]
    before = sources.identify(source)
    system.pipe("/texts/b.txt", b"Another.")
    assert sources.identify(source) != before


BAD_URIS = [
    ("nothing://bucket/x", "cannot be listed.*Protocol not known: nothing"),
    ("memory://nowhere", "cannot be listed.*FileNotFoundError: /nowhere"),
]


@pytest.mark.parametrize(("uri", "message"), BAD_URIS)
def test_a_uri_that_cannot_be_listed_is_one_error(uri: str, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        list_files([SourceConfig(name="s", kind="other", path=uri)])


def test_a_page_of_a_warc_and_a_record_tell_their_address(tmp_path: Path) -> None:
    warc = read(write(tmp_path / "a.warc", warc_record("http://a/", PAGE.encode())))
    lines = read(write(tmp_path / "b.jsonl", b'{"text": "One.", "url": "http://b/"}\n{"text": "Two.", "url": 7}'))
    assert [document.url for document in (*warc, *lines)] == ["http://a/", "http://b/", None]
    table = pa.table({"url": ["http://c/", None], "text": ["One.", "Two."]})
    pq.write_table(table, tmp_path / "c.parquet")
    rows = read(write(tmp_path / "d.csv", b"url,text\nhttp://d/,One.\n,Two.\n"))
    assert [document.url for document in (*read(tmp_path / "c.parquet"), *rows)] == ["http://c/", None, "http://d/", None]
    assert [document.content for document in rows] == ["One.", "Two."]
