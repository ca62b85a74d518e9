"""One text of the corpus and where it stood, and why a text is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import xxhash

Kind = Literal["book", "web", "wikipedia"]
Markup = Literal["text", "html", "wikitext"]


@dataclass(frozen=True)
class RawDocument:
    """One document as it stands in a file, its markup still on it."""

    offset: int
    """Where in the file: character of a plain text's chunk, 0 for a page, page id in a MediaWiki dump."""
    markup: Markup
    content: str
    rejection: Rejection | None = None
    """Set where the file itself says that this is no text, such as a redirect."""


@dataclass(frozen=True)
class Rejection:
    """Why a document is left out: the rule's name, which is counted, and what was measured."""

    reason: str
    detail: str = ""


def make_doc_id(source: str, path: str, offset: int) -> int:
    """Give the 64-bit identity of a document: a hash of where it stands, the same on every run and every machine."""
    return xxhash.xxh3_64_intdigest(f"{source}\0{path}\0{offset}".encode())
