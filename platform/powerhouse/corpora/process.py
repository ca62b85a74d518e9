"""All that is done to one document by itself: extract, redact, judge, sign. Tables of documents in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from powerhouse.corpora import dedup
from powerhouse.corpora.document import RawDocument, Rejection, make_doc_id
from powerhouse.corpora.extract import extract
from powerhouse.corpora.filters import DocumentView, Language, QualityConfig, first_rejection
from powerhouse.corpora.readers import read_documents
from powerhouse.corpora.redact import redact
from powerhouse.corpora.sources import InputFile
from powerhouse.errors import InputError

BAD_FILE = "bad_file"
_PLACE: list[tuple[str, pa.DataType]] = [
    ("order", pa.int64()),  # number of the file, then of the document in it: the order of the whole corpus
    ("doc_id", pa.uint64()),
    ("source", pa.string()),
    ("kind", pa.string()),
    ("path", pa.string()),
    ("offset", pa.int64()),
]
_VERDICT: list[tuple[str, pa.DataType]] = [("reason", pa.string()), ("detail", pa.string())]
RAW = pa.schema([*_PLACE, *_VERDICT, ("markup", pa.string()), ("content", pa.large_string())])
JUDGED = pa.schema(
    [
        *_PLACE,
        *_VERDICT,
        ("text", pa.large_string()),
        ("num_chars", pa.int64()),
        ("num_emails", pa.int32()),
        ("num_phones", pa.int32()),
        ("num_ips", pa.int32()),
        ("text_hash", pa.uint64()),
        ("signature", pa.binary(4 * dedup.NUM_PERMUTATIONS)),
    ]
)
_CHARS_PER_TABLE = 2**22
DOCUMENTS_PER_FILE = 2**32
"""Room that the column `order` leaves for the documents of one file."""


def read_files(files: Iterable[InputFile], chunk_chars: int) -> Iterator[pa.Table]:
    """Yield the raw documents of the files; a damaged file gives a last row with the reason `bad_file`."""
    rows: list[dict[str, Any]] = []
    num_chars = 0
    for row in (row for file in files for row in _rows(file, chunk_chars)):
        rows.append(row)
        num_chars += len(row["content"])
        if num_chars >= _CHARS_PER_TABLE:
            yield pa.Table.from_pylist(rows, schema=RAW)
            rows, num_chars = [], 0
    yield pa.Table.from_pylist(rows, schema=RAW)


def _rows(file: InputFile, chunk_chars: int) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for number, raw in enumerate(read_documents(file.path, chunk_chars), start=1):
            yield _row(file, number - 1, raw)
    except InputError as error:
        bad = RawDocument(0, "text", "", Rejection(BAD_FILE, str(error)))
        # Its own id: the file may have given a good document at offset 0 before the damage.
        yield _row(file, number, bad) | {"doc_id": make_doc_id(file.source, f"{file.relative}\0{BAD_FILE}", 0)}


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
        "content": raw.content,
    }


class DocumentProcessor:
    """Raw documents in, judged documents out; it holds the language model, so it is made once a worker."""

    def __init__(self, limits: QualityConfig, phone_region: str) -> None:
        self._limits = limits
        self._phone_region = phone_region
        self._language = Language()

    def __call__(self, raw: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(list(self._judge_all(raw.to_pylist())), schema=JUDGED)

    def _judge_all(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            markup, content = row.pop("markup"), row.pop("content")
            yield row | self._judge(markup, content, row["reason"])

    def _judge(self, markup: Any, content: str, reason: str | None) -> dict[str, Any]:
        """Give the columns that the text itself decides. One already left out, such as a redirect, keeps its markup."""
        if reason:
            return {"text": content, "num_chars": len(content), "num_emails": 0, "num_phones": 0, "num_ips": 0}
        text, found = redact(extract(markup, content), self._phone_region)
        view = DocumentView(text)
        rejection = first_rejection(view, self._limits, self._language)
        return {
            "reason": rejection.reason if rejection else None,
            "detail": rejection.detail if rejection else None,
            "text": text,
            "num_chars": len(text),
            "num_emails": found.get("EMAIL", 0),
            "num_phones": found.get("PHONE", 0),
            "num_ips": found.get("IP", 0),
            "text_hash": None if rejection else dedup.text_hash(view.normalised_words),
            "signature": None if rejection else dedup.signature(view.normalised_words).tobytes(),
        }
