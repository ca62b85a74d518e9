"""Long texts cut at blank lines.

A plain text is a book, too coarse a document for deduplication and for the train/held-out split, so it is cut at blank lines.
Which blank lines depends on the text around them alone (content-defined chunking, Muthitacharoen et al. 2001): two editions
of one book, one with a longer preface, fall into the same chunks after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import xxhash


def split_chunks(lines: Iterable[tuple[int, str]], chunk_chars: int) -> Iterator[tuple[int, str]]:
    """Join lines, each with its place, to chunks of about `chunk_chars` characters; yield each with that of its first line.

    From half that size on, a line break at a blank line is a cut with a chance, by the hash of the paragraph before it, that
    makes the mean come out; from twice that size on, every line break is a cut. Only a longer single line makes a longer chunk.
    """
    num_chars = 0
    start: int | None = None
    chunk: list[str] = []
    paragraph: list[str] = []
    for place, line in lines:
        start = place if start is None else start
        chunk.append(line)
        paragraph.append(line)
        num_chars += len(line)
        is_blank = not line.strip()
        is_cut = is_blank and num_chars >= chunk_chars // 2 and _is_cut("".join(paragraph), chunk_chars // 2)
        if is_cut or num_chars >= 2 * chunk_chars:
            yield start, "".join(chunk)
            num_chars = 0
            start = None
            chunk = []
        if is_blank:
            paragraph = []
    if start is not None:
        yield start, "".join(chunk)


def _is_cut(paragraph: str, mean_chars: int) -> bool:
    """Say yes with chance paragraph_chars / mean_chars, decided by the paragraph's own text."""
    return xxhash.xxh3_64_intdigest(paragraph.encode()) < 2**64 * len(paragraph) / mean_chars
