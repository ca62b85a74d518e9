"""Near and exact duplicates by MinHash (Broder 1997) and locality-sensitive hashing; pure functions over arrays.

Shapes: N documents, P permutations, B bands of V values each, K = 1 + B keys of a document.

Two documents are candidates when one band of their signatures is equal, or their whole text; with 14 bands of 8 that finds
92% of the pairs with Jaccard similarity 0.8 and 5% of those with 0.5. A candidate is removed only if its own similarity
to a document that is kept reaches the threshold: never by a chain of others, which on text with shared templates removes almost
everything.

Signatures and keys lie in files that are mapped into memory, and are looked at one band at a time and some rows at a time: what
has to fit into memory is some 100 bytes for each document, whatever the length of its signature.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import rensa
import xxhash

from powerhouse.corpora.document import Columns, Draft, Outcome, Removal
from powerhouse.telemetry import make_logger

NUM_PERMUTATIONS = 112
NUM_BANDS = 14
_NGRAM_WORDS = 5
_MAX_KEPT = 1000
_ROWS_AT_ONCE = 2**14
_SEED = 1
_MIX = np.uint64(0x9E3779B97F4A7C15)

U64 = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A document to remove: numbers of it and of the kept one, and the estimated similarity of the two."""

    removed: int
    kept: int
    similarity: float
    is_exact: bool


def shingles(words: list[str]) -> list[str]:
    """Give the runs of 5 words; a shorter text is one run."""
    last = max(1, len(words) - _NGRAM_WORDS + 1)
    return [" ".join(words[start : start + _NGRAM_WORDS]) for start in range(last)]


def signature(words: list[str]) -> Signatures:
    """Give the MinHash of the text's shingles, [P]."""
    sketch = rensa.RMinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED)
    sketch.update(shingles(words))
    return np.array(sketch.digest(), dtype=np.uint32)


def text_hash(words: list[str]) -> int:
    """Give the hash by which texts are exactly the same: letter case, punctuation and white space do not count."""
    return xxhash.xxh3_64_intdigest(" ".join(words).encode())


def similarity(signatures_NP: Signatures, others_NP: Signatures) -> npt.NDArray[np.float64]:
    """Estimate the Jaccard similarities, [N]; standard error at most 0.5 / sqrt(P) = 0.047."""
    return np.asarray((signatures_NP == others_NP).mean(axis=-1))


def read_signatures(column: pa.ChunkedArray, is_wanted_N: npt.NDArray[np.bool_]) -> Iterator[Signatures]:
    """Yield the wanted of a column of signatures, none of them null, some at a time."""
    start = 0
    for chunk in column.cast(pa.binary(4 * NUM_PERMUTATIONS)).chunks:
        here_NP = np.frombuffer(chunk.buffers()[1], dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS)[chunk.offset :]
        for first in range(0, len(chunk), _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, len(chunk))
            yield here_NP[first:last][is_wanted_N[start + first : start + last]]
        start += len(chunk)


def detection_probability(jaccard: float) -> float:
    """Give the chance that two texts of this similarity share a band: 1 - (1 - s^V)^B (Leskovec et al., section 3.4)."""
    return float(1 - (1 - jaccard ** (NUM_PERMUTATIONS // NUM_BANDS)) ** NUM_BANDS)


def band_keys(signatures_NP: Signatures) -> U64:
    """Hash each band with its number, [B, N]: equal keys mark candidates."""
    return np.stack([_hash_band(signatures_NP[:, _columns(band)], band) for band in range(NUM_BANDS)])


def _columns(band: int) -> slice:
    num_values = NUM_PERMUTATIONS // NUM_BANDS
    return slice(band * num_values, (band + 1) * num_values)


def _hash_band(values_NV: Signatures, band: int) -> U64:
    keys_N = np.full(len(values_NV), band, dtype=np.uint64) * _MIX
    for values_N in values_NV.T:
        keys_N = (keys_N ^ values_N.astype(np.uint64)) * _MIX
        keys_N ^= keys_N >> np.uint64(29)
    return keys_N


def find_duplicates(
    signatures: Iterable[Signatures], hashes_N: U64, lengths_N: Indices, threshold: float, folder: Path | None = None
) -> Iterator[Duplicate]:
    """Yield what to remove of N documents with these signatures, text hashes and lengths.

    The signatures come some at a time; `folder`, or else the system's folder for such files, has to have room for 560 bytes of
    each document.
    """
    num_documents = len(hashes_N)
    if not num_documents:
        return
    with ExitStack() as stack:
        signatures_NP, keys_BN = (
            _map_scratch(stack.enter_context(tempfile.TemporaryFile(dir=folder)), kind, shape)
            for kind, shape in ((np.uint32, (num_documents, NUM_PERMUTATIONS)), (np.uint64, (NUM_BANDS, num_documents)))
        )
        filled = 0
        for some_NP in signatures:
            rows = slice(filled, filled + len(some_NP))
            signatures_NP[rows], keys_BN[:, rows] = some_NP, band_keys(some_NP)
            filled += len(some_NP)
        assert filled == num_documents, "every document has a signature"
        for group in clusters(num_documents, map(candidates, [hashes_N, *keys_BN])):
            yield from choose(group, signatures_NP, hashes_N, lengths_N, threshold)


def _map_scratch(file: Any, kind: Any, shape: tuple[int, int]) -> Any:
    return np.asarray(np.memmap(file, kind, "w+", shape=shape))  # a memmap itself takes long to index


def candidates(keys_N: U64) -> tuple[Indices, Indices]:
    """Join the documents that share a key."""
    documents = np.argsort(keys_N, kind="stable")
    return edges(keys_N[documents], documents)


def edges(sorted_keys: U64, documents: Indices) -> tuple[Indices, Indices]:
    """Join each document to the first one with the same key: a star per key. The keys come sorted."""
    is_first = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(sorted_keys)]
    first_of_row = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    return documents[first_of_row[~is_first]], documents[~is_first]


def clusters(num_documents: int, pairs: Iterable[tuple[Indices, Indices]]) -> Iterator[Indices]:
    """Yield the connected components with more than one document, each as ascending numbers, by their first.

    The pairs of one band are forgotten before those of the next come: what they join has one label from then on.
    """
    # Slow to load, and only the process that decides needs them: the workers sign.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels_N = np.arange(num_documents, dtype=np.int32 if num_documents < 2**31 else np.int64)
    for left, right in pairs:
        one, other = labels_N[left], labels_N[right]
        is_new = one != other
        if is_new.any():
            ends = (one[is_new], other[is_new])
            graph = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(num_documents, num_documents))
            labels_N = connected_components(graph, directed=False)[1][labels_N]
    members = np.flatnonzero(np.bincount(labels_N)[labels_N] > 1)
    members = members[np.argsort(labels_N[members], kind="stable")]
    starts = np.flatnonzero(np.diff(labels_N[members], prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(members)]):
        yield members[start:stop]


def choose(members: Indices, signatures_NP: Signatures, hashes: U64, lengths: Indices, threshold: float) -> list[Duplicate]:
    """Keep the longest member, the first of equals, and remove those like it; then the same among what is left.

    A template can chain a million texts, and all their pairs would take days. So of a large cluster, first those go that are
    like the first of a band that they share; what is left is compared with the first 1000 kept, and the others stay.
    """
    left = members[np.lexsort((members, -lengths[members]))]
    removed: list[Duplicate] = []
    if len(left) > _MAX_KEPT:
        removed = _choose_by_band(left, signatures_NP, hashes, threshold)
        left = left[~np.isin(left, [found.removed for found in removed])]
    for _ in range(_MAX_KEPT):
        if len(left) < 2:
            break
        kept, rest = int(left[0]), left[1:]
        estimate, is_exact, is_removed = _compare(signatures_NP, hashes, left[:1], rest, threshold)
        found = zip(rest[is_removed], estimate[is_removed], is_exact[is_removed], strict=True)
        removed += [Duplicate(int(number), kept, float(value), bool(exact)) for number, value, exact in found]
        left = rest[~is_removed]
    return removed


def _compare(signatures_NP: Signatures, hashes: U64, one: Indices, other: Indices, threshold: float) -> tuple[Any, Any, Any]:
    """Give of each pair, or of one and each other, the estimated similarity, whether the texts are equal, and whether alike."""
    estimate = np.empty(len(other))
    for start in range(0, len(other), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        estimate[part] = similarity(signatures_NP[one[part] if len(one) > 1 else one], signatures_NP[other[part]])
    is_exact = hashes[one] == hashes[other]
    return estimate, is_exact, is_exact | (estimate >= threshold)


def _choose_by_band(ordered: Indices, signatures_NP: Signatures, hashes: U64, threshold: float) -> list[Duplicate]:
    """Remove the members like a kept one that comes first in one of their bands; the best come first."""
    alike = [
        _alike_by_key(keys, ordered, signatures_NP, hashes, threshold) for keys in _keys_of(ordered, signatures_NP, hashes)
    ]
    left, right, estimate, is_exact = (np.concatenate(column) for column in zip(*alike, strict=True))
    removed: dict[int, Duplicate] = {}
    for edge in np.argsort(right, kind="stable").tolist():
        kept, number = int(ordered[left[edge]]), int(ordered[right[edge]])
        if kept not in removed and number not in removed:
            removed[number] = Duplicate(number, kept, float(estimate[edge]), bool(is_exact[edge]))
    return list(removed.values())


def _keys_of(rows: Indices, signatures_NP: Signatures, hashes: U64) -> Iterator[U64]:
    """Yield the keys of some documents, one kind after the other."""
    yield hashes[rows]
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    for band in range(NUM_BANDS):
        values = (signatures_NP[rows[start : start + _ROWS_AT_ONCE], _columns(band)] for start in starts)
        yield np.concatenate([_hash_band(values_NV, band) for values_NV in values])


def _alike_by_key(keys: U64, ordered: Indices, signatures_NP: Signatures, hashes: U64, threshold: float) -> tuple[Any, ...]:
    left, right = candidates(keys)
    if not len(left):
        return left, right, np.empty(0), np.empty(0, dtype=bool)
    estimate, is_exact, is_alike = _compare(signatures_NP, hashes, ordered[left], ordered[right], threshold)
    return left[is_alike], right[is_alike], estimate[is_alike], is_exact[is_alike]


class Sign:
    """The document step: the columns by which duplicates are found."""

    schema: Columns = (("text_hash", pa.uint64()), ("signature", pa.binary(4 * NUM_PERMUTATIONS)))

    def __call__(self, draft: Draft) -> None:
        words = draft.view.normalised_words
        draft.columns |= {"text_hash": text_hash(words), "signature": signature(words).tobytes()}


class RemoveDuplicates:
    """The corpus step: exact and near duplicates among the documents that nothing else left out."""

    name = "duplicates"

    def __init__(self, threshold: float, max_source_share: float, folder: Path | None = None) -> None:
        self._threshold = threshold
        self._max_source_share = max_source_share
        self._folder = folder

    def __call__(self, index: pa.Table) -> Outcome:
        removals = list(self._remove(index))
        num_exact = sum(removal.reason == "exact_duplicate" for removal in removals)
        sizes = Counter(Counter(removal.twin for removal in removals).values())
        shares = shares_by_source(index, removals)
        report = {
            "exact": num_exact,
            "near": len(removals) - num_exact,
            "clusters_by_size": {str(size + 1): count for size, count in sorted(sizes.items())},
            "removed_share_by_source": shares,
            "alarms": self._alarms(shares),
        }
        return Outcome(removals, report)

    def _alarms(self, shares: dict[str, float]) -> list[str]:
        """Name the sources that lost more than they may; an alarm is for people, the corpus is made all the same."""
        most = self._max_source_share
        lost = {source: share for source, share in shares.items() if share > most}
        for source, share in lost.items():
            fields = {"source": source, "removed_share": share, "max_source_duplicate_share": most}
            told = "a source loses much of itself as duplicates: look at the pairs"
            make_logger("corpora").warning(told, extra={"fields": fields})
        return [f"{source}: {share:.0%} removed as duplicates, more than {most:.0%}" for source, share in lost.items()]

    def _remove(self, index: pa.Table) -> Iterator[Removal]:
        is_accepted = pc.is_null(index["reason"]).to_numpy()
        rows = np.flatnonzero(is_accepted)
        hashes_N, lengths_N = (index[name].to_numpy()[rows] for name in ("text_hash", "num_chars"))
        signatures = read_signatures(index["signature"], is_accepted)
        doc_ids = index["doc_id"]
        for found in find_duplicates(signatures, hashes_N, lengths_N, self._threshold, self._folder):
            reason = "exact_duplicate" if found.is_exact else "near_duplicate"
            row, kept = int(rows[found.removed]), int(rows[found.kept])
            yield Removal(row, reason, f"{found.similarity:.2f} like {doc_ids[kept]}", kept, found.similarity)


def shares_by_source(index: pa.Table, removals: Sequence[Removal]) -> dict[str, float]:
    """Give the share of each source's accepted documents that are removed."""
    sources = index["source"]
    accepted = pc.value_counts(sources.filter(pc.is_null(index["reason"]))).to_pylist()
    removed = Counter(sources.take(pa.array([removal.row for removal in removals], type=pa.int64())).to_pylist())
    return {item["values"]: round(removed[item["values"]] / item["counts"], 4) for item in accepted}
