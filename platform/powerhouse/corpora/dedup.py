"""Near and exact duplicates by MinHash (Broder 1997) and locality-sensitive hashing; pure functions over arrays.

Shapes: N documents, P permutations, B bands of V values each, K = 1 + B keys of a document.

Two documents are candidates when one band of their signatures is equal, or their whole text; with 14 bands of 8 that finds
92% of the pairs with Jaccard similarity 0.8 and 5% of those with 0.5. A candidate is removed only if its own similarity
to a document that is kept reaches the threshold: never by a chain of others, which on text with shared templates removes almost
everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import rensa
import xxhash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from powerhouse.corpora.document import Columns, Draft, Outcome, Removal
from powerhouse.telemetry import make_logger

NUM_PERMUTATIONS = 112
NUM_BANDS = 14
_NGRAM_WORDS = 5
_MAX_KEPT = 1000
_SEED = 1
_MIX = np.uint64(0x9E3779B97F4A7C15)

U64 = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
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


def signatures_of(column: pa.ChunkedArray, is_wanted_N: npt.NDArray[np.bool_]) -> Signatures:
    """Give the wanted of a column of signatures, none of them null, as an array, [N, P]; it is the only copy that is made."""
    signatures_NP = np.empty((int(is_wanted_N.sum()), NUM_PERMUTATIONS), dtype=np.uint32)
    start = filled = 0
    for chunk in column.cast(pa.binary(4 * NUM_PERMUTATIONS)).chunks:
        here_NP = np.frombuffer(chunk.buffers()[1], dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS)
        wanted_NP = here_NP[chunk.offset : chunk.offset + len(chunk)][is_wanted_N[start : start + len(chunk)]]
        signatures_NP[filled : filled + len(wanted_NP)] = wanted_NP
        start, filled = start + len(chunk), filled + len(wanted_NP)
    return signatures_NP


def detection_probability(jaccard: float) -> float:
    """Give the chance that two texts of this similarity share a band: 1 - (1 - s^V)^B (Leskovec et al., section 3.4)."""
    return float(1 - (1 - jaccard ** (NUM_PERMUTATIONS // NUM_BANDS)) ** NUM_BANDS)


def band_keys(signatures_NP: Signatures) -> U64:
    """Hash each band with its number, [N, B]: equal keys mark candidates."""
    num_documents = len(signatures_NP)
    bands_NBV = signatures_NP.reshape(num_documents, NUM_BANDS, NUM_PERMUTATIONS // NUM_BANDS)
    keys_NB = np.broadcast_to(np.arange(NUM_BANDS, dtype=np.uint64) * _MIX, (num_documents, NUM_BANDS)).copy()
    for value in range(bands_NBV.shape[2]):
        keys_NB = (keys_NB ^ bands_NBV[:, :, value].astype(np.uint64)) * _MIX
        keys_NB ^= keys_NB >> np.uint64(29)
    return keys_NB


def find_duplicates(signatures_NP: Signatures, hashes_N: U64, lengths_N: Indices, threshold: float) -> list[Duplicate]:
    """Give what to remove of N documents with these signatures, text hashes and lengths."""
    left, right = candidates(np.concatenate([hashes_N[:, None], band_keys(signatures_NP)], axis=1))
    groups = clusters(len(hashes_N), left, right)
    return [found for group in groups for found in choose(group, signatures_NP, hashes_N, lengths_N, threshold)]


def candidates(keys_NK: U64) -> tuple[Indices, Indices]:
    """Join the documents that share a key in one of the columns; the work of one column needs no other."""
    pairs = []
    for keys_N in keys_NK.T:
        documents = np.argsort(keys_N, kind="stable")
        pairs.append(edges(keys_N[documents], documents))
    return np.concatenate([left for left, _ in pairs]), np.concatenate([right for _, right in pairs])


def edges(sorted_keys: U64, documents: Indices) -> tuple[Indices, Indices]:
    """Join each document to the first one with the same key: a star per key. The keys come sorted."""
    is_first = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(sorted_keys)]
    first_of_row = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    return documents[first_of_row[~is_first]], documents[~is_first]


def clusters(num_documents: int, left: Indices, right: Indices) -> list[Indices]:
    """Give the connected components with more than one document, each as ascending numbers."""
    if not len(left):
        return []
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(num_documents, num_documents))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [group for group in groups if len(group) > 1]


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
        estimate = similarity(signatures_NP[rest], signatures_NP[kept])
        is_exact = hashes[rest] == hashes[kept]
        is_removed = is_exact | (estimate >= threshold)
        found = zip(rest[is_removed], estimate[is_removed], is_exact[is_removed], strict=True)
        removed += [Duplicate(int(number), kept, float(value), bool(exact)) for number, value, exact in found]
        left = rest[~is_removed]
    return removed


def _choose_by_band(ordered: Indices, signatures_NP: Signatures, hashes: U64, threshold: float) -> list[Duplicate]:
    """Remove the members like a kept one that comes first in one of their bands; the best come first."""
    left, right = candidates(np.concatenate([hashes[ordered, None], band_keys(signatures_NP[ordered])], axis=1))
    first, later = ordered[left], ordered[right]
    estimate = similarity(signatures_NP[first], signatures_NP[later])
    is_exact = hashes[first] == hashes[later]
    is_alike = is_exact | (estimate >= threshold)
    by_place = np.flatnonzero(is_alike)[np.argsort(right[is_alike], kind="stable")]
    removed: dict[int, Duplicate] = {}
    for edge in by_place.tolist():
        kept, number = int(first[edge]), int(later[edge])
        if kept not in removed and number not in removed:
            removed[number] = Duplicate(number, kept, float(estimate[edge]), bool(is_exact[edge]))
    return list(removed.values())


class Sign:
    """The document step: the columns by which duplicates are found."""

    schema: Columns = (("text_hash", pa.uint64()), ("signature", pa.binary(4 * NUM_PERMUTATIONS)))

    def __call__(self, draft: Draft) -> None:
        words = draft.view.normalised_words
        draft.columns |= {"text_hash": text_hash(words), "signature": signature(words).tobytes()}


class RemoveDuplicates:
    """The corpus step: exact and near duplicates among the documents that nothing else left out."""

    name = "duplicates"

    def __init__(self, threshold: float, max_source_share: float) -> None:
        self._threshold = threshold
        self._max_source_share = max_source_share

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
        lost = {source: share for source, share in shares.items() if share > self._max_source_share}
        for source, share in lost.items():
            fields = {"source": source, "removed_share": share, "max_source_duplicate_share": self._max_source_share}
            make_logger("corpora").warning(
                "a source loses much of itself as duplicates: look at the pairs", extra={"fields": fields}
            )
        return [
            f"{source}: {share:.0%} removed as duplicates, more than {self._max_source_share:.0%}"
            for source, share in lost.items()
        ]

    def _remove(self, index: pa.Table) -> Iterator[Removal]:
        is_accepted = pc.is_null(index["reason"])
        rows = np.flatnonzero(is_accepted.to_numpy())
        accepted = index.select(["doc_id", "text_hash", "num_chars"]).filter(is_accepted)
        doc_ids, hashes_N, lengths_N = (accepted[name].to_numpy() for name in accepted.column_names)
        signatures_NP = signatures_of(index["signature"], is_accepted.to_numpy())
        for found in find_duplicates(signatures_NP, hashes_N, lengths_N, self._threshold):
            reason = "exact_duplicate" if found.is_exact else "near_duplicate"
            detail = f"{found.similarity:.2f} like {doc_ids[found.kept]}"
            yield Removal(int(rows[found.removed]), reason, detail, int(rows[found.kept]), found.similarity)


def shares_by_source(index: pa.Table, removals: Sequence[Removal]) -> dict[str, float]:
    """Give the share of each source's accepted documents that are removed."""
    accepted = Counter(index.filter(pc.is_null(index["reason"]))["source"].to_pylist())
    removed = Counter(index["source"][removal.row].as_py() for removal in removals)
    return {source: round(removed[source] / count, 4) for source, count in accepted.items()}
