"""Where the raw text lies: folders of files, listed in an order that every machine finds again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from powerhouse.artifacts import MANIFEST, UNFINISHED, Artifact
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.document import Kind
from powerhouse.corpora.readers import reader_of
from powerhouse.errors import InputError


class SourceConfig(Config):
    """One folder of raw text."""

    name: str
    """Name in the report and in every document."""
    kind: Kind
    """What it holds: book, web or wikipedia."""
    path: StoragePath
    """Folder; inside a texts artifact, or any folder of your own."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often a document of it stands in train/: 0.5 keeps half of them, chosen by their hash, 2 writes each twice."""
    glob: str = "**/*.*"
    """Which files under the folder; the ending (.txt .html .xml, each also .gz .bz2) chooses the reader."""


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    number: int
    """Place in the order of all files of all sources."""
    source: str
    kind: Kind
    relative: str
    """Path below the source's folder, with `/`."""
    path: Path
    size_bytes: int


def list_files(sources: Sequence[SourceConfig]) -> list[InputFile]:
    """List the files of all sources: the sources in their order, their files by name.

    Raises:
        InputError: a folder is missing, has no file that matches, or has one that no reader knows.
    """
    found = [(source, path) for source in sources for path in _matching(source)]
    for _, path in found:
        reader_of(path)
    return [
        InputFile(number, source.name, source.kind, path.relative_to(source.path).as_posix(), path, path.stat().st_size)
        for number, (source, path) in enumerate(found)
    ]


def _matching(source: SourceConfig) -> list[Path]:
    if not source.path.is_dir():
        raise InputError(f"inputs: {source.name}: no such folder", got=source.path, do="fetch the texts, or correct the path")
    paths = sorted(path for path in source.path.glob(source.glob) if path.is_file())
    if not paths:
        what = f"inputs: {source.name}: no file in {source.path} matches"
        raise InputError(what, got=f"glob {source.glob!r}", do="put files there, or correct the glob")
    return paths


def identify(source: SourceConfig) -> tuple[str, Artifact | str]:
    """Give what the source's content depends on: its folder inside an artifact, and that; else "", and a hash of its files.

    Raises:
        ArtifactError: the folder is part of unfinished work.
    """
    for folder in (source.path, *source.path.parents):
        if (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
            return str(source.path.relative_to(folder)), Artifact.open(folder, "texts")
    total = hashlib.sha256()
    for path in _matching(source):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(source.path).as_posix()}\0{content}\n".encode())
    return "", total.hexdigest()
