"""Where the raw text lies: folders of files, listed in an order that every machine finds again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
from pydantic import AfterValidator, BeforeValidator, Field

from powerhouse.artifacts import MANIFEST, UNFINISHED, Artifact
from powerhouse.config import Config, storage_root
from powerhouse.corpora.document import Kind
from powerhouse.corpora.members import find_bz2_stream, find_warc_member
from powerhouse.corpora.opening import list_remote, open_raw
from powerhouse.corpora.plain import SECTION_BYTES
from powerhouse.corpora.readers import ReadOptions, kind_of, reader_of
from powerhouse.errors import InputError

PIECE_BYTES = 2**26
"""A larger file that can be split is read in pieces of about this size."""

Location = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    AfterValidator(lambda text: text if "://" in text else str(storage_root() / text)),
]
"""A URI that fsspec knows, or a path of data: relative under the storage root."""


class SourceConfig(Config):
    """One folder of raw text."""

    name: str
    """Name in the report and in every document."""
    kind: Kind
    """What it holds: book, web, wikipedia or other."""
    path: Location
    """Folder; inside a texts artifact, or any folder of your own, or a URI such as s3://bucket/folder."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often a document of it stands in train/: 0.5 keeps half of them, chosen by their hash, 2 writes each twice."""
    glob: str = "**/*.*"
    """Which files under the folder; the ending (.txt .jsonl .csv .parquet .html .warc .epub .xml) chooses the reader."""
    text_column: str = "text"
    """Where a .jsonl, .csv or .parquet file has its text."""


@dataclass(frozen=True)
class InputFile:
    """One file of a source, or a piece of a large one."""

    number: int
    """Place in the order of all files and pieces of all sources."""
    source: str
    kind: Kind
    relative: str
    """Path below the source's folder, with `/`."""
    location: str
    """Path or URI."""
    size_bytes: int
    text_column: str = "text"
    first: int = 0
    last: int | None = None
    """The piece, see ReadOptions."""

    def options(self, chunk_chars: int) -> ReadOptions:
        return ReadOptions(chunk_chars, self.text_column, self.first, self.last)


def list_files(sources: Sequence[SourceConfig]) -> list[InputFile]:
    """List the files of all sources: the sources in their order, their files by name.

    Raises:
        InputError: a folder is missing, has no file that matches, or has one that no reader knows.
    """
    found = [(source, *file) for source in sources for file in _matching(source)]
    for _, _, location, _ in found:
        reader_of(location)
    pieces = [(*file, *piece) for file in found for piece in _pieces(file[2], file[3])]
    return [
        InputFile(number, source.name, source.kind, relative, location, size, source.text_column, first, last)
        for number, (source, relative, location, _, first, last, size) in enumerate(pieces)
    ]


def _pieces(location: str, size_bytes: int) -> Iterator[tuple[int, int | None, int]]:
    """Give the pieces of a file as first, last and size in bytes; its size and content decide them."""
    num_pieces = -(-size_bytes // PIECE_BYTES)
    if num_pieces < 2 or not _can_be_split(location):
        yield 0, None, size_bytes
        return
    ending = Path(location).suffix.lower()
    unit = SECTION_BYTES if ending == ".txt" else 1
    num_units = _num_row_groups(location) if ending == ".parquet" else -(-size_bytes // unit)
    bounds = [num_units * piece // num_pieces * unit for piece in range(num_pieces + 1)]
    for first, last in pairwise(bounds):
        if last > first:
            yield first, None if last == bounds[-1] else last, size_bytes // num_pieces


def _can_be_split(location: str) -> bool:
    """Tell whether the file's places can be told without reading it from its beginning; a packed one where it is many."""
    packed, kind = Path(location).suffix.lower(), kind_of(location)
    find = {(".warc", ".gz"): find_warc_member, (".xml", ".bz2"): find_bz2_stream}.get((kind, packed))
    if find is None and (packed.partition("-")[0] != kind or kind not in (".txt", ".jsonl", ".parquet", ".xml")):
        return False
    try:
        with open_raw(location) as file:
            return file.seekable() and (find is None or find(file, 1, PIECE_BYTES) is not None)
    except (OSError, InputError):
        return False  # its reader will tell


def _num_row_groups(location: str) -> int:
    """Give it, or 1 for a damaged file, of which its reader tells."""
    try:
        with open_raw(location) as file:
            return int(pq.ParquetFile(file).num_row_groups)
    except (OSError, ValueError):
        return 1


def _matching(source: SourceConfig) -> list[tuple[str, str, int]]:
    """Give path below the folder, location and size of every file that matches, by name."""
    found = sorted(_list_remote(source) if "://" in source.path else _list_local(source))
    if not found:
        what = f"inputs: {source.name}: no file in {source.path} matches"
        raise InputError(what, got=f"glob {source.glob!r}", do="put files there, or correct the glob")
    return found


def _list_local(source: SourceConfig) -> list[tuple[str, str, int]]:
    folder = Path(source.path)
    if not folder.is_dir():
        raise InputError(f"inputs: {source.name}: no such folder", got=folder, do="fetch the texts, or correct the path")
    paths = (path for path in folder.glob(source.glob) if path.is_file())
    return [(path.relative_to(folder).as_posix(), str(path), path.stat().st_size) for path in paths]


def _list_remote(source: SourceConfig) -> list[tuple[str, str, int]]:
    # As pathlib has it, **/ may also stand for no folder.
    globs = (source.glob, source.glob.removeprefix("**/"))
    return [
        (file.name, f"{source.path.rstrip('/')}/{file.name}", file.size_bytes)
        for file in list_remote(source.path)
        if any(fnmatch(file.name, glob) for glob in globs)
    ]


def identify(source: SourceConfig) -> tuple[str, Artifact | str]:
    """Give what the source's content depends on: its folder inside an artifact, and that; else "", and a hash of its files.

    Raises:
        ArtifactError: the folder is part of unfinished work.
    """
    total = hashlib.sha256()
    if "://" in source.path:
        for remote in sorted(list_remote(source.path), key=lambda remote: remote.name):
            total.update(f"{remote.name}\0{remote.version}\n".encode())
        return "", total.hexdigest()
    for folder in (Path(source.path), *Path(source.path).parents):
        if (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
            return str(Path(source.path).relative_to(folder)), Artifact.open(folder, "texts")
    found = _matching(source)
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        for (relative, _, _), digest in zip(found, pool.map(_digest, (location for _, location, _ in found)), strict=True):
            total.update(f"{relative}\0{digest}\n".encode())
    return "", total.hexdigest()


def _digest(location: str) -> str:
    with open(location, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
