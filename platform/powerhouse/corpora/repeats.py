"""Repetition above and below the document: pages fetched twice, and lines that stand in many documents.

Lines follow CCNet (Wenzek et al. 2019, arXiv 1911.00359, section 3.1): they are the same if they differ only in letter case, in
outer white space or in numbers. Unlike there a line goes from every document once it is in too many of them. Shapes: L lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from powerhouse.corpora.document import Columns, Draft, Outcome, Removal

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_NUMBER = re.compile(r"\d+")
_TRACKING = re.compile(r"(?:utm_\w+|gclid|fbclid|msclkid|mc_[ce]id|ref|ref_src)$", re.IGNORECASE)
_DEFAULT_PORT = re.compile(r":(?:80|443)$")
_NUM_PARTS = 16
_PART_SIZE = np.uint64(2**64 // _NUM_PARTS)
_ROWS_AT_ONCE = 2**14
_BLANK = 0  # the hash of a line without text


def normalise_url(url: str) -> str:
    """Give one form of all addresses of a page: no scheme, www., default port, fragment, tracking field or last slash."""
    parts = urlsplit(url.strip())
    host = _DEFAULT_PORT.sub("", parts.netloc.rpartition("@")[2].lower()).removeprefix("www.")
    fields = sorted(field for field in parse_qsl(parts.query, keep_blank_values=True) if not _TRACKING.match(field[0]))
    return f"{host}{parts.path.rstrip('/')}{'?' if fields else ''}{urlencode(fields)}"


class KeyUrl:
    """The document step: the hash of the page's address, null where the file tells of none."""

    schema: Columns = (("url_key", pa.uint64()),)

    def __call__(self, draft: Draft) -> None:
        url = draft.raw.url
        try:
            draft.columns["url_key"] = xxhash.xxh3_64_intdigest(normalise_url(url).encode(errors="replace")) if url else None
        except ValueError:  # no valid address, such as one with half an IPv6 host
            draft.columns["url_key"] = None


class RemoveSameUrls:
    """The corpus step: of the pages of one address the longest stays, the first of equals."""

    name = "same_urls"

    def __call__(self, index: pa.Table) -> Outcome:
        removals = list(self._remove(index))
        return Outcome(removals, {"removed": len(removals)} if removals else {})

    def _remove(self, index: pa.Table) -> Iterator[Removal]:
        rows = np.flatnonzero(pc.and_(pc.is_null(index["reason"]), pc.is_valid(index["url_key"])).to_numpy())
        there = index.select(["url_key", "num_chars", "doc_id"]).take(rows)
        keys = there["url_key"].to_numpy()
        best_first = np.lexsort((rows, -there["num_chars"].to_numpy(), keys))
        first = 0
        for place, number in enumerate(best_first.tolist()):
            if place == 0 or keys[number] != keys[best_first[first]]:
                first = place
            else:
                yield Removal(int(rows[number]), "same_url", f"longer at {there['doc_id'][int(best_first[first])]}")


def line_hashes(text: str) -> U64:
    """Give the hash of each line of a text, 0 for a blank one, [L]."""
    lines = (_NUMBER.sub("0", line.strip().lower()) for line in text.split("\n"))
    return np.array([xxhash.xxh3_64_intdigest(line.encode()) if line else _BLANK for line in lines], dtype=np.uint64)


def drop_lines(text: str, repeated: U64) -> str:
    """Take the lines with these hashes, ascending, out of a text."""
    is_dropped = np.isin(line_hashes(text), repeated)
    return "\n".join(line for line, dropped in zip(text.split("\n"), is_dropped, strict=True) if not dropped)


class HashLines:
    """The document step: hash and length of every line."""

    schema: Columns = (("line_hashes", pa.list_(pa.uint64())), ("line_chars", pa.list_(pa.int32())))

    def __call__(self, draft: Draft) -> None:
        draft.columns["line_hashes"] = line_hashes(draft.text).tolist()
        draft.columns["line_chars"] = [len(line) for line in draft.text.split("\n")]


class RemoveLines:
    """The corpus step: which lines stand in more than so many of the documents that are left; a part of all lines at a time."""

    name = "repeated_lines"

    def __init__(self, max_documents: int) -> None:
        self._max_documents = max_documents

    def __call__(self, index: pa.Table) -> Outcome:
        repeated = np.concatenate([self._find(index, part) for part in range(_NUM_PARTS)])
        num_chars = index["num_chars"].to_numpy().copy()
        num_lines, removals = 0, list[Removal]()
        for rows, place_L, hashes_L, chars_L in _read_lines(index):
            is_kept_L = ~np.isin(hashes_L, repeated)
            num_lines += int((~is_kept_L).sum())
            num_chars[rows] = np.maximum(0, np.bincount(place_L[is_kept_L], chars_L[is_kept_L] + 1, len(rows)) - 1)
            has_text = np.bincount(place_L[is_kept_L & (hashes_L != _BLANK)], minlength=len(rows)) > 0
            removals += [Removal(int(row), "only_repeated_lines") for row in rows[~has_text]]
        report = {"lines": num_lines, "different_lines": len(repeated), "documents_of_nothing_else": len(removals)}
        return Outcome(removals, report, {"num_chars": pa.array(num_chars)}, repeated)

    def _find(self, index: pa.Table, part: int) -> U64:
        """Give the repeated lines among those whose hashes lie in one part of all, ascending."""
        once = []
        for _, place_L, hashes_L, _ in _read_lines(index):
            is_here = (hashes_L // _PART_SIZE == part) & (hashes_L != _BLANK)
            place_L, hashes_L = place_L[is_here], hashes_L[is_here]
            order = np.lexsort((place_L, hashes_L))
            place_L, hashes_L = place_L[order], hashes_L[order]
            is_new = np.concatenate([[True], (hashes_L[1:] != hashes_L[:-1]) | (place_L[1:] != place_L[:-1])])[: len(order)]
            once.append(hashes_L[is_new])
        found, num_documents = np.unique(np.concatenate(once), return_counts=True)
        return np.asarray(found[num_documents > self._max_documents])


def _read_lines(index: pa.Table) -> Iterator[tuple[Indices, Indices, U64, npt.NDArray[np.int32]]]:
    """Yield some of the rows that are left, and of each of their lines its row's place among them, its hash and its length."""
    first = 0
    for batch in index.select(["reason", "line_hashes", "line_chars"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        rows = np.flatnonzero(pc.is_null(batch["reason"]).to_numpy(zero_copy_only=False))
        lines, chars = (batch[name].take(pa.array(rows)) for name in ("line_hashes", "line_chars"))
        place_L = np.repeat(np.arange(len(rows)), pc.list_value_length(lines).to_numpy(zero_copy_only=False))
        yield rows + first, place_L, lines.flatten().to_numpy(), chars.flatten().to_numpy()
        first += batch.num_rows
