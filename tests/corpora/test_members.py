"""Packed files in pieces: whatever the bytes at which they are cut, each document is read once."""

from __future__ import annotations

import bz2
import gzip
import io
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from powerhouse.corpora import members, sources
from powerhouse.corpora.document import RawDocument
from powerhouse.corpora.readers import ReadOptions, read_documents
from powerhouse.corpora.sources import SourceConfig, list_files
from powerhouse.errors import InputError
from raw_files import warc_record, write


def read(path: Path, first: int = 0, last: int | None = None) -> list[RawDocument]:
    return list(read_documents(path, ReadOptions(first=first, last=last)))


def dump() -> bytes:
    texts = [f"Page {number} of &lt;page&gt; and BZh91AY&amp;SY, être. {'x' * (number * 7 % 20)}" for number in range(12)]
    pages = [
        f"<page><ns>0</ns><id>{number}</id><revision><text>{text}</text></revision></page>\n"
        for number, text in enumerate(texts)
    ]
    return f"<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.11/'>\n{''.join(pages)}</mediawiki>\n".encode()


def streams(content: bytes, num_bytes: int) -> bytes:
    """Pack as pbzip2 does, cut anywhere; each third stream is an empty one more."""
    parts = [content[start : start + num_bytes] for start in range(0, len(content), num_bytes)]
    return b"".join(bz2.compress(part) + (bz2.compress(b"") if number % 3 == 0 else b"") for number, part in enumerate(parts))


def multistream(content: bytes) -> bytes:
    """Pack as Wikipedia's dumps are: the head, some pages a stream, the tail."""
    head, *pages = content.split(b"<page>")
    last, tail = pages[-1].split(b"</mediawiki>")
    pages = [b"<page>" + page for page in [*pages[:-1], last]]
    groups = [b"".join(pages[start : start + 5]) for start in range(0, len(pages), 5)]
    return b"".join(map(bz2.compress, [head, *groups, b"</mediawiki>" + tail]))


DUMPS: dict[str, Callable[[bytes], bytes]] = {
    "plain.xml": bytes,
    "streams-of-41-bytes.xml.bz2": lambda content: streams(content, 41),
    "streams-of-300-bytes.xml-p1p12.bz2": lambda content: streams(content, 300),
    "multistream.xml.bz2": multistream,
    "one-stream.xml.bz2": bz2.compress,
}


@pytest.mark.parametrize("name", DUMPS)
def test_two_pieces_of_a_dump_are_the_whole_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, DUMPS[name](dump()))
    whole = read(path)
    assert [page.offset for page in whole] == list(range(12))
    size = path.stat().st_size
    for cut in random.Random(0).sample(range(1, size), 50):
        assert read(path, 0, cut) + read(path, cut) == whole
    bounds = [0, *range(1, size, max(1, size // 20)), None]
    pieces = [read(path, first or 0, last) for first, last in pairwise(bounds)]
    assert [page for piece in pieces for page in piece] == whole


def records() -> list[bytes]:
    rng = random.Random(1)
    pages = [
        warc_record(f"http://a/{number}", b"<p>" + rng.randbytes(rng.randrange(300)).hex().encode()) for number in range(9)
    ]
    archived = b"".join(gzip.compress(page) for page in pages)
    noise = b"".join(rng.randbytes(40) + b"\x1f\x8b\x08\x00" for _ in range(20))
    others = [
        warc_record("http://a/b.warc.gz", archived, kind="application/gzip"),
        warc_record("http://a/noise", noise, kind="image/png"),
        warc_record("http://a/c", b"<p>" + noise),
    ]
    return [*pages[:3], others[0], *pages[3:6], *others[1:], *pages[6:]]


WARCS: dict[str, Callable[[], bytes]] = {
    "packed": lambda: b"".join(map(gzip.compress, records())),
    "stored as it is": lambda: b"".join(gzip.compress(record, 0) for record in records()),
    "several in a member": lambda: gzip.compress(b"".join(records()[:5])) + b"".join(map(gzip.compress, records()[5:])),
    "all in one member": lambda: gzip.compress(b"".join(records())),
}


@pytest.mark.parametrize("name", WARCS)
def test_two_pieces_of_a_warc_are_the_whole_wherever_it_is_cut(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_READ_BYTES", 100)
    path = write(tmp_path / "a.warc.gz", WARCS[name]())
    whole = read(path)
    assert len({page.offset for page in whole}) == len(whole) == 10
    size = path.stat().st_size
    for cut in random.Random(0).sample(range(1, size), 40):
        assert read(path, 0, cut) + read(path, cut) == whole
    bounds = [0, *range(1, size, size // 25), None]
    pieces = [read(path, first or 0, last) for first, last in pairwise(bounds)]
    assert [page for piece in pieces for page in piece] == whole


def test_a_member_of_an_archived_file_that_lies_there_as_it_is_is_no_beginning(tmp_path: Path) -> None:
    """A stored block is at most 65,535 bytes: an archived file of more is broken by the heads of the blocks."""
    page = gzip.compress(warc_record("http://a/", b"<p>" + random.Random(0).randbytes(500).hex().encode()))
    large = gzip.compress(warc_record("http://a/b.warc.gz", page * 250, kind="application/gzip"), 0)
    path = write(tmp_path / "a.warc.gz", page + large + page * 200)
    with path.open("rb") as file:
        assert members.find_warc_member(file, 1) == len(page)
        for start in (len(page) + 1, len(page) + len(large) - 50_000):
            assert members.find_warc_member(file, start) == len(page) + len(large)


@pytest.mark.parametrize("num_scanned", [1, 7, 64])
def test_what_begins_at_the_edge_of_what_is_read_at_once_is_found(
    tmp_path: Path, num_scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_SCAN_BYTES", num_scanned)
    parts = [bz2.compress(bytes([number]) * 50) for number in range(5)]
    path = write(tmp_path / "a.bz2", b"".join(parts))
    starts = [sum(map(len, parts[:number])) for number in range(5)]
    with path.open("rb") as file:
        for start in range(path.stat().st_size):
            assert members.find_bz2_stream(file, start) == next((place for place in starts if place >= start), None)
        assert members.find_bz2_stream(file, 1, starts[1]) is None
        assert members.find_bz2_stream(file, 1, starts[1] + 1) == starts[1]


NUM_PIECES = {
    "many.xml.bz2": (streams(dump(), 41), True),
    "many.xml": (dump(), True),
    "many.warc.gz": (WARCS["packed"](), True),
    "one.xml.bz2": (bz2.compress(dump()), False),
    "one.warc.gz": (WARCS["all in one member"](), False),
    "one.xml.gz": (gzip.compress(dump()), False),
    "one.jsonl.gz": (gzip.compress(random.Random(0).randbytes(900).hex().encode()), False),
    "one.csv": (b"text\n" + b"x" * 2000, False),
}  # fmt: skip


@pytest.mark.parametrize("name", NUM_PIECES)
def test_what_can_be_read_from_its_middle_is_read_in_pieces(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, is_split = NUM_PIECES[name]
    monkeypatch.setattr(sources, "PIECE_BYTES", 400)
    path = write(tmp_path / name, content)
    files = list_files([SourceConfig(name="s", kind="other", path=tmp_path)])
    assert (len(files) > 1) == is_split
    if is_split:
        assert [item for file in files for item in read_documents(file.location, file.options(1000))] == read(path)


@pytest.mark.parametrize("num_bytes", [10, 65_536, 70_000, 200_000])
@pytest.mark.parametrize("size", [1000, 65_536])
def test_a_member_is_read_to_where_the_next_begins(num_bytes: int, size: int) -> None:
    content = bytes(random.Random(0).choices(b"abcdef ", k=num_bytes))
    packed = gzip.compress(content)
    member = members.GzipMember(io.BytesIO(packed + packed))
    assert b"".join(iter(lambda: member.read(size), b"")) == content
    assert member.num_packed == len(packed)
    assert [place for place, _ in members.read_members(io.BytesIO(packed * 3), 5)] == [5, 5 + len(packed), 5 + 2 * len(packed)]


def test_damage_at_the_border_of_two_pieces_is_told(tmp_path: Path) -> None:
    parts = [gzip.compress(record) for record in records()]
    content = b"".join(parts[:6]) + b"\0" * 10 + b"".join(parts[6:])
    cut = len(b"".join(parts[:6])) - 1
    path = write(tmp_path / "a.warc.gz", content)
    with pytest.raises(InputError, match=f"a.warc.gz: truncated or damaged.*\n.*do not follow each other around byte {cut}"):
        read(path, 0, cut)
