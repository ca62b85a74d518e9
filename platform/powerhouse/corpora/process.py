"""All that is done to one document by itself: extract, redact, judge, sign. Tables of documents in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from powerhouse.corpora.document import Columns, DocumentStep, Draft, RawDocument, Rejection, make_doc_id
from powerhouse.corpora.extract import MAX_DEPTH, markup_depth
from powerhouse.corpora.extractor import ExtractionError, Extractor
from powerhouse.corpora.readers import read_documents
from powerhouse.corpora.sources import InputFile
from powerhouse.errors import InputError

BAD_FILE = "bad_file"
_PLACE: Columns = (
    ("order", pa.int64()),  # number of the file, then of the document in it: the order of the whole corpus
    ("doc_id", pa.uint64()),
    ("source", pa.string()),
    ("kind", pa.string()),
    ("path", pa.string()),
    ("offset", pa.int64()),
)
_VERDICT: Columns = (("reason", pa.string()), ("detail", pa.string()))
RAW = pa.schema([*_PLACE, *_VERDICT, ("markup", pa.string()), ("url", pa.string()), ("content", pa.large_string())])
_TEXT: Columns = (("text", pa.large_string()), ("num_chars", pa.int64()))
_CHARS_PER_TABLE = 2**22
_CHARS_PER_ROW = 400
"""What a row takes besides its text, counted as characters: empty documents have a limit too."""
DOCUMENTS_PER_FILE = 2**32
"""Room that the column `order` leaves for the documents of one file."""


def read_files(files: Iterable[InputFile], chunk_chars: int) -> Iterator[pa.Table]:
    """Yield the raw documents of the files; a damaged file gives a last row with the reason `bad_file`.

    The tables have about 4 MB of text each. At least one is given, and an empty one only where there is no document.
    """
    rows: list[dict[str, Any]] = []
    num_chars = 0
    for row in (row for file in files for row in _rows(file, chunk_chars)):
        if num_chars >= _CHARS_PER_TABLE:
            yield pa.Table.from_pylist(rows, schema=RAW)
            rows, num_chars = [], 0
        rows.append(row)
        num_chars += len(row["content"]) + _CHARS_PER_ROW
    yield pa.Table.from_pylist(rows, schema=RAW)


def _rows(file: InputFile, chunk_chars: int) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for number, raw in enumerate(read_documents(file.location, file.options(chunk_chars)), start=1):
            yield _row(file, number - 1, raw)
    except InputError as error:
        bad = RawDocument(0, "text", "", Rejection(BAD_FILE, str(error)))
        # Its own id: the file may have given a good document at offset 0 before the damage.
        yield _row(file, number, bad) | {"doc_id": make_doc_id(file.source, f"{file.relative}\0{BAD_FILE}", file.first)}


def _row(file: InputFile, number: int, raw: RawDocument) -> dict[str, Any]:
    return {
        "order": file.number * DOCUMENTS_PER_FILE + number,
        "doc_id": make_doc_id(file.source, file.relative, raw.offset),
        "source": file.source,
        "kind": file.kind,
        "path": file.relative,
        "offset": raw.offset,
        "reason": raw.rejection.reason if raw.rejection else None,
        "detail": raw.rejection.detail if raw.rejection else None,
        "markup": raw.markup,
        "url": raw.url,
        "content": raw.content,
    }


class DocumentProcessor:
    """Raw documents in, documents with the columns of every step out; made once a worker."""

    def __init__(self, steps: Sequence[DocumentStep], extract_timeout_s: float) -> None:
        self._steps = steps
        self._extract = Extractor(extract_timeout_s)
        self.schema = pa.schema([*_PLACE, *_VERDICT, *_TEXT, *(column for step in steps for column in step.schema)])

    def __call__(self, raw: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._judge(row) for row in raw.to_pylist()], schema=self.schema)

    def _judge(self, row: dict[str, Any]) -> dict[str, Any]:
        """Give the document's columns. One already left out, such as a redirect, keeps its markup."""
        rejection = Rejection(row["reason"], row["detail"]) if row["reason"] else None
        raw = RawDocument(row["offset"], row.pop("markup"), row.pop("content"), rejection, row.pop("url"))
        draft = self._draft(raw)
        for step in self._steps:
            if draft.rejection is None:
                step(draft)
        found = draft.rejection
        verdict = {"reason": found.reason if found else None, "detail": found.detail if found else None}
        return row | verdict | {"text": draft.text, "num_chars": len(draft.text)} | draft.columns

    def _draft(self, raw: RawDocument) -> Draft:
        """Give the document's text; one that is already left out, or that the parsers cannot take, keeps its markup."""
        rejection = raw.rejection
        if rejection is None and (depth := markup_depth(raw.markup, raw.content)) > MAX_DEPTH[raw.markup]:
            rejection = Rejection("nested_too_deep", f"{depth} > {MAX_DEPTH[raw.markup]}")
        if rejection is None:
            try:
                return Draft(raw, self._extract(raw.markup, raw.content))
            except ExtractionError as error:
                rejection = Rejection(f"extraction_{error.reason}", str(error))
        return Draft(raw, raw.content, rejection)
