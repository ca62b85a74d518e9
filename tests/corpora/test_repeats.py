from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from powerhouse.corpora import repeats
from powerhouse.corpora.document import Draft, RawDocument, Removal
from powerhouse.corpora.repeats import (
    HashLines,
    KeyUrl,
    RemoveLines,
    RemoveSameUrls,
    drop_lines,
    line_hashes,
    normalise_url,
)

SAME = [
    ("https://www.Example.com/a/", "http://example.com/a"),
    ("http://example.com:80/a#top", "https://example.com/a"),
    ("http://example.com/a?b=1&utm_source=x&a=2&gclid=7", "http://example.com/a?a=2&b=1"),
    ("http://user:secret@example.com/", "http://example.com"),
]
DIFFERENT = [
    ("http://example.com/a", "http://example.com/A"),
    ("http://example.com/a?page=1", "http://example.com/a?page=2"),
    ("http://example.com:8080/", "http://example.com/"),
    ("http://blog.example.com/", "http://example.com/"),
    ("http://example.com/?q=", "http://example.com/"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_addresses_of_one_page_have_one_form(one: str, other: str) -> None:
    assert normalise_url(one) == normalise_url(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_addresses_of_different_pages_have_different_forms(one: str, other: str) -> None:
    assert normalise_url(one) != normalise_url(other)


def key_of(url: str | None) -> Any:
    draft = Draft(RawDocument(0, "html", "", url=url), "text")
    KeyUrl()(draft)
    return draft.columns["url_key"]


def test_a_page_without_an_address_or_with_a_broken_one_has_no_key() -> None:
    assert key_of("http://example.com/a") == key_of("https://example.com/a/") is not None
    assert (key_of(None), key_of(""), key_of("http://[::1")) == (None, None, None)


def test_of_the_pages_of_one_address_the_longest_and_first_stays() -> None:
    index = pa.table(
        {
            "doc_id": pa.array(range(10, 17), type=pa.uint64()),
            "reason": pa.array([None, None, None, None, None, "language", None], type=pa.string()),
            "num_chars": [5, 9, 9, 7, 1, 99, 3],
            "url_key": pa.array([1, 1, 1, None, None, 1, 2], type=pa.uint64()),
        }
    )
    outcome = RemoveSameUrls()(index)
    assert sorted(outcome.removals, key=lambda removal: removal.row) == [
        Removal(0, "same_url", "longer at 11"),
        Removal(2, "same_url", "longer at 11"),
    ]
    assert outcome.report == {"removed": 2}
    assert RemoveSameUrls()(index.slice(3)).removals == []


def test_lines_are_the_same_without_case_numbers_and_outer_blanks() -> None:
    one = line_hashes("  Page 12 of 300\n\nÉté\t")
    assert one.tolist() == line_hashes("page 9 of 1\n   \nété").tolist()
    assert one[1] == 0
    assert len(set(line_hashes("a\nb\na b").tolist())) == 3


def test_repeated_lines_go_and_the_rest_stays_as_it_was() -> None:
    text = "Menu\n  Home page 1\n\nIt was so.\nMENU"
    repeated = np.sort(line_hashes("menu\nhome page 7"))
    assert drop_lines(text, repeated) == "\nIt was so."
    assert drop_lines(text, repeated[:0]) == text


def index_of(*texts: str) -> pa.Table:
    step = HashLines()
    rows = []
    for text in texts:
        draft = Draft(RawDocument(0, "text", ""), text)
        step(draft)
        rows.append(draft.columns)
    columns = {name: pa.array([row[name] for row in rows], type=kind) for name, kind in step.schema}
    reasons = pa.array([None] * len(texts), type=pa.string())
    return pa.table({"reason": reasons, "num_chars": [len(text) for text in texts], **columns})


def test_a_line_in_more_documents_than_allowed_is_dropped_and_the_lengths_are_those_of_what_is_written() -> None:
    texts = ["Share\nOne two", "share\nShare\nThree\n\nfour", "SHARE\nShare ", "Only\nOnly\nOnly\nFive"]
    outcome = RemoveLines(2)(index_of(*texts))
    assert outcome.repeated_lines is not None
    assert outcome.repeated_lines.tolist() == line_hashes("share").tolist()
    assert outcome.removals == [Removal(2, "only_repeated_lines")]
    assert outcome.report == {"lines": 5, "different_lines": 1, "documents_of_nothing_else": 1}
    written = [drop_lines(text, outcome.repeated_lines) for text in texts]
    assert outcome.columns["num_chars"].to_pylist() == [len(text) for text in written]
    kept = RemoveLines(3)(index_of(*texts))
    assert kept.report == {"lines": 0, "different_lines": 0, "documents_of_nothing_else": 0}


def test_documents_left_out_before_neither_count_nor_change() -> None:
    index = index_of("a\nb", "a\nc", "a\nd")
    index = index.set_column(0, "reason", pa.array([None, None, "language"], type=pa.string()))
    assert RemoveLines(2)(index).report["lines"] == 0
    assert RemoveLines(1)(index).columns["num_chars"].to_pylist() == [1, 1, 3]


def test_lines_are_counted_the_same_some_documents_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = ["\n".join(f"line {chr(97 + number)}" for number in rng.integers(0, 26, 5)) for _ in range(60)]
    counts = Counter(hash_ for text in texts for hash_ in set(line_hashes(text).tolist()))
    expected = sorted(hash_ for hash_, count in counts.items() if count > 10)
    assert 0 < len(expected) < len(counts)
    outcomes = []
    for num_rows in (100, 7):
        monkeypatch.setattr(repeats, "_ROWS_AT_ONCE", num_rows)
        outcome = RemoveLines(10)(index_of(*texts))
        assert outcome.repeated_lines is not None
        assert outcome.repeated_lines.tolist() == expected
        outcomes.append((outcome.removals, outcome.report, outcome.columns["num_chars"].to_pylist()))
    assert outcomes[0] == outcomes[1]
    repeated = np.array(expected, dtype=np.uint64)
    assert outcomes[0][2] == [len(drop_lines(text, repeated)) for text in texts]
