"""One text of the corpus and where it stood, why a text is left out, and the two kinds of step that a corpus is made by.

A document step looks at one document by itself, in a worker. A corpus step looks at the columns of all documents together, on
the driver, and never at a text. `steps.py` lists the steps of both kinds in their order; a new one is added there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from powerhouse.corpora.view import DocumentView

Kind = Literal["book", "web", "wikipedia", "other"]
Markup = Literal["text", "html", "wikitext"]
Columns = tuple[tuple[str, pa.DataType], ...]


@dataclass(frozen=True)
class RawDocument:
    """One document as it stands in a file, its markup still on it."""

    offset: int
    """Where in the file: byte of a plain text's chunk or of a line of a table, 0 for a page, page id in a MediaWiki dump."""
    markup: Markup
    content: str
    rejection: Rejection | None = None
    """Set where the file itself says that this is no text, such as a redirect."""
    url: str | None = None
    """Address of a page, where the file tells it."""


@dataclass(frozen=True)
class Rejection:
    """Why a document is left out: the rule's name, which is counted, and what was measured."""

    reason: str
    detail: str = ""


@dataclass
class Draft:
    """A document on its way through the document steps; they may change its text or reject it, and add columns."""

    raw: RawDocument
    text: str
    rejection: Rejection | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def replace_text(self, text: str) -> None:
        if text != self.text:
            self.text = text
            self.__dict__.pop("view", None)

    @cached_property
    def view(self) -> DocumentView:
        """The text's words and lines, split once for all steps that look at this text."""
        return DocumentView(self.text)


class DocumentStep(Protocol):
    """One thing done to each document that is not rejected yet; made once a worker.

    A document that an earlier step rejected has null in the columns.
    """

    @property
    def schema(self) -> Columns:
        """The columns that it adds to every document. All but texts are held by the driver: keep them small."""
        ...

    def __call__(self, draft: Draft) -> None: ...


@dataclass(frozen=True, slots=True)
class Removal:
    """A document to leave out of the corpus; rows are numbers in the index."""

    row: int
    reason: str
    detail: str = ""
    twin: int | None = None
    """The kept document that it is like, shown beside it in the report."""
    similarity: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a corpus step decided."""

    removals: Sequence[Removal] = ()
    report: dict[str, Any] = field(default_factory=dict)
    """Its section of the report: numbers, or lists and tables of plain values. Empty for none."""
    columns: dict[str, pa.Array] = field(default_factory=dict)
    """Columns of the index that its decision changes, such as num_chars, for all rows."""
    repeated_lines: npt.NDArray[np.uint64] | None = None
    """Ascending hashes of the lines to take out of every text (`repeats.line_hashes`)."""


class CorpusStep(Protocol):
    """One decision over all documents.

    It gets the index: the columns of every document in the corpus' order, with `reason` null where nothing left it out so far.
    """

    @property
    def name(self) -> str:
        """Name of its section in the report."""
        ...

    def __call__(self, index: pa.Table) -> Outcome: ...


def make_doc_id(source: str, path: str, offset: int) -> int:
    """Give the 64-bit identity of a document: a hash of where it stands, the same on every run and every machine."""
    return xxhash.xxh3_64_intdigest(f"{source}\0{path}\0{offset}".encode())
