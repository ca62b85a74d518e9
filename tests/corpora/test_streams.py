"""Large files: read in pieces, to the same documents, and never whole in memory."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from powerhouse.corpora import plain, sources
from powerhouse.corpora.document import RawDocument
from powerhouse.corpora.readers import ReadOptions, read_documents
from powerhouse.corpora.sources import SourceConfig, list_files
from raw_files import paragraphs, parquet, warc_record, write, zstandard


def read(path: Path) -> list[RawDocument]:
    return list(read_documents(path, ReadOptions(chunk_chars=1000)))


def test_pieces_of_a_large_file_hold_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Document {number} {'x' * (number * 7 % 50)}" for number in range(300)]
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    write(tmp_path / "b.parquet", parquet(list(texts), row_group_size=7))
    for name in ("a.jsonl", "b.parquet"):
        whole = read(tmp_path / name)
        for piece_bytes in (100, 777, 5000):
            monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
            files = list_files([SourceConfig(name="s", kind="other", path=str(tmp_path), glob=name)])
            assert len(files) > 1
            assert [item for file in files for item in read_documents(file.location, file.options(1000))] == whole


ODD_LINES = {
    "unix": "\n",
    "windows": "\r\n",
    "old mac": "\r",
}


@pytest.mark.parametrize("name", ODD_LINES)
@pytest.mark.parametrize("long_chars", [0, 3000, 30_000])
def test_pieces_of_a_text_give_the_chunks_of_the_whole_at_the_bytes_where_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, long_chars: int
) -> None:
    monkeypatch.setattr(plain, "MAX_LINE_BYTES", 1001)
    for module in (plain, sources):
        monkeypatch.setattr(module, "SECTION_BYTES", 2000)
    text = (paragraphs(0, 150) + "être " * (long_chars // 5) + paragraphs(150, 300)).replace("says", "dît")
    content = b"\xef\xbb\xbf" + text.replace("\n", ODD_LINES[name]).encode()
    write(tmp_path / "a.txt", content)
    whole = read(tmp_path / "a.txt")
    assert "".join(item.content for item in whole) == text
    assert [item.offset for item in whole] == sorted({item.offset for item in whole})
    if name == "unix":
        assert all(content.startswith(item.content[:20].encode(), item.offset) for item in whole[1:] if "ê" not in item.content)
    assert read(write(tmp_path / "b.txt.gz", gzip.compress(content))) == whole
    for piece_bytes in (1500, 3333, 9999):
        monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
        files = list_files([SourceConfig(name="s", kind="other", path=str(tmp_path), glob="a.txt")])
        assert len(files) > 1
        assert [item for file in files for item in read_documents(file.location, file.options(1000))] == whole


def peak_of_reading(path: Path) -> int:
    """Read a file to its end and give the most that this process had in memory meanwhile, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is counted from here
    for _document in read_documents(path, ReadOptions()):
        pass
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def wiki(number: int) -> bytes:
    text = paragraphs(number, number + 200)
    return f"<page><ns>0</ns><id>{number}</id><revision><text>{text}</text></revision></page>".encode()


LARGE: dict[str, tuple[bytes, Callable[[int], bytes], bytes]] = {
    "a.txt": (b"", lambda number: paragraphs(number, number + 200).encode(), b""),
    "a.txt.gz": (b"", lambda number: gzip.compress(paragraphs(number, number + 200).encode(), 1), b""),
    "a.jsonl": (b"", lambda number: json.dumps({"text": paragraphs(number, number + 200)}).encode() + b"\n", b""),
    "a.csv.zst": (zstandard(b"text\n"), lambda number: zstandard(f'"{paragraphs(number, number + 200)}"\n'.encode()), b""),
    "a.warc.gz": (
        b"", lambda number: gzip.compress(warc_record("http://a/", b"<p>" + paragraphs(number, number + 200).encode()), 1), b""
    ),
    "a.xml.bz2": (bz2.compress(b"<mediawiki>"), lambda number: bz2.compress(wiki(number), 1), bz2.compress(b"</mediawiki>")),
}  # fmt: skip
"""How a file begins, a record of some 9 kB, and how it ends."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    head, record, tail = LARGE[name]
    records = b"".join(map(record, range(100)))
    small = write(tmp_path / f"small-{name}", head + records + tail)
    large = tmp_path / f"large-{name}"
    with large.open("wb") as file:
        file.write(head)
        for _ in range(20):
            file.write(records)
        file.write(tail)
    del records

    before = peak_of_reading(small)
    assert peak_of_reading(large) < before + 10_000_000, "the large one has 19 MB of text, the small one has 1"
