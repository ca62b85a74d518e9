from __future__ import annotations

import math
from pathlib import Path

import datasketch
import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from planted import near_duplicates
from powerhouse.corpora import dedup
from powerhouse.corpora.document import Removal


def words(seed: int, count: int = 400) -> list[str]:
    return [f"w{value}" for value in np.random.default_rng(seed).integers(0, 5000, count)]


def exact_jaccard(left: list[str], right: list[str]) -> float:
    one, other = set(dedup.shingles(left)), set(dedup.shingles(right))
    return len(one & other) / len(one | other)


def edited(base: list[str], share: float) -> list[str]:
    """Replace the last `share` of the words."""
    cut = int(len(base) * (1 - share))
    return base[:cut] + words(999, len(base) - cut)


def find(texts: list[list[str]], threshold: float = 0.8) -> list[tuple[int, int, bool]]:
    signatures = np.stack([dedup.signature(text) for text in texts])
    hashes = np.array([dedup.text_hash(text) for text in texts], dtype=np.uint64)
    lengths = np.array([len(text) for text in texts])
    found = dedup.find_duplicates([signatures], hashes, lengths, threshold)
    return [(item.removed, item.kept, item.is_exact) for item in found]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3, 0.6, 1.0])
def test_the_estimate_is_within_three_standard_errors_of_the_exact_similarity(share: float) -> None:
    base = words(0)
    other = edited(base, share)
    exact = exact_jaccard(base, other)
    estimate = dedup.similarity(dedup.signature(base), dedup.signature(other))
    assert abs(estimate - exact) <= 3 * np.sqrt(exact * (1 - exact) / dedup.NUM_PERMUTATIONS) + 1e-12


def test_exact_and_near_duplicates_go_and_the_longest_and_first_stay() -> None:
    base = words(0)
    texts = [base, words(1), list(base), edited(base, 0.04), [*base, "and", "more"], words(2)]
    assert sorted(find(texts)) == [(0, 4, False), (2, 4, False), (3, 4, False)]
    assert find([base, base]) == [(1, 0, True)]


def test_texts_shorter_than_a_shingle_are_duplicates_only_of_the_same() -> None:
    assert find([["a", "b"], ["a", "c"], ["a", "b"], []]) == [(2, 0, True)]


def test_a_chain_of_small_edits_never_removes_a_text_unlike_the_kept_one() -> None:
    base = words(0)
    texts = [edited(base, step * 0.06) for step in range(8)]
    found = find(texts)
    removed = {item[0] for item in found}
    assert removed
    for gone, kept, _ in found:
        assert kept not in removed
        assert exact_jaccard(texts[gone], texts[kept]) > 0.65
    assert exact_jaccard(texts[0], texts[7]) < 0.65
    assert len(texts) - len(removed) >= 2


def test_two_similar_texts_share_a_band_as_often_as_the_theory_says() -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 2**32, (4000, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    is_equal = rng.random(left.shape) < 0.8
    right = np.where(is_equal, left, rng.integers(0, 2**32, left.shape, dtype=np.uint32))
    found = (dedup.band_keys(left) == dedup.band_keys(right)).any(axis=0).mean()
    theory = 1 - (1 - 0.8 ** (dedup.NUM_PERMUTATIONS // dedup.NUM_BANDS)) ** dedup.NUM_BANDS
    assert abs(found - theory) < 0.02


def test_edges_are_stars_around_the_first_of_each_key() -> None:
    left, right = dedup.edges(np.array([3, 3, 3, 5, 8, 8], dtype=np.uint64), np.array([10, 11, 12, 20, 30, 31]))
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(10, 11), (10, 12), (30, 31)]


def test_no_documents_give_no_duplicates() -> None:
    assert list(dedup.find_duplicates([], np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64), 0.8)) == []


@pytest.mark.parametrize("jaccard", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_planted_near_duplicates_become_candidates_as_often_as_the_theory_says(jaccard: float) -> None:
    pairs = near_duplicates(jaccard, 150)
    assert all(exact == pytest.approx(exact_jaccard(one, other), abs=1e-12) for one, other, exact in pairs[:5])
    keys = [dedup.band_keys(np.stack([dedup.signature(text) for text in pair])) for *pair, _ in pairs]
    num_found = sum(bool((pair_BN[:, 0] == pair_BN[:, 1]).any()) for pair_BN in keys)
    chances = [dedup.detection_probability(exact) for *_, exact in pairs]
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances))  # of a sum of independent draws
    assert abs(num_found - sum(chances)) <= 4 * deviation + 1e-9


def test_the_estimate_is_as_good_as_datasketchs() -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for one, other, exact in (pair for jaccard in (0.5, 0.7, 0.9) for pair in near_duplicates(jaccard, 15)):
        errors["ours"].append(float(dedup.similarity(dedup.signature(one), dedup.signature(other))) - exact)
        sketches = [datasketch.MinHash(num_perm=dedup.NUM_PERMUTATIONS) for _ in range(2)]
        for sketch, text in zip(sketches, (one, other), strict=True):
            sketch.update_batch([shingle.encode() for shingle in dedup.shingles(text)])
        errors["theirs"].append(sketches[0].jaccard(sketches[1]) - exact)
    ours, theirs = (math.sqrt(np.mean(np.square(values))) for values in errors.values())
    assert ours < 1.5 * theirs
    assert abs(np.mean(errors["ours"])) < 3 * 0.5 / math.sqrt(dedup.NUM_PERMUTATIONS * 45)


def test_what_datasketchs_index_finds_and_is_similar_enough_is_found_here_too() -> None:
    pairs = [pair for jaccard in (0.5, 0.8, 0.95) for pair in near_duplicates(jaccard, 12, seed=3)]
    texts = [text for one, other, _ in pairs for text in (one, other)]
    signatures = np.stack([dedup.signature(text) for text in texts])
    sketches = [
        datasketch.MinHash(num_perm=dedup.NUM_PERMUTATIONS, hashvalues=values.astype(np.uint64), scheme="affine32")
        for values in signatures
    ]
    index = datasketch.MinHashLSH(params=(dedup.NUM_BANDS, 8), num_perm=dedup.NUM_PERMUTATIONS)
    for number, sketch in enumerate(sketches):
        index.insert(number, sketch)
    expected = {
        (number, other)
        for number, sketch in enumerate(sketches)
        for other in index.query(sketch)
        if other < number and dedup.similarity(signatures[number], signatures[other]) >= 0.8
    }
    assert {(removed, kept) for removed, kept, _ in find(texts)} == expected
    assert len(expected) > 12


def test_signatures_come_out_of_a_column_as_they_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = np.random.default_rng(0).integers(0, 2**32, (7, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    kind = pa.binary(4 * dedup.NUM_PERMUTATIONS)
    column = pa.chunked_array(
        [pa.array([row.tobytes() for row in part], type=kind) for part in (signatures[:3], signatures[3:])]
    )
    for sliced, start in ((column, 0), (column.slice(1, 4), 1)):
        here = signatures[start : start + len(sliced)]
        for is_wanted in (np.ones(len(sliced), dtype=bool), np.arange(len(sliced)) % 2 == 1):
            for num_rows in (1, 2, 100):
                monkeypatch.setattr(dedup, "_ROWS_AT_ONCE", num_rows)
                np.testing.assert_array_equal(np.concatenate([*dedup.read_signatures(sliced, is_wanted)]), here[is_wanted])


def found_at_once(signatures: dedup.Signatures, hashes: dedup.U64, lengths: dedup.Indices) -> list[dedup.Duplicate]:
    """The oracle: the keys of all bands as one array, one graph of all pairs, and each cluster's signatures compared whole."""
    keys = np.concatenate([hashes[None], dedup.band_keys(signatures)])
    pairs = [dedup.candidates(row) for row in keys]
    left, right = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(hashes), len(hashes)))
    labels = connected_components(graph, directed=False)[1]
    found = []
    for members in (np.flatnonzero(labels == label) for label in np.flatnonzero(np.bincount(labels) > 1)):
        left = members[np.lexsort((members, -lengths[members]))]
        while len(left) > 1:
            kept, rest = int(left[0]), left[1:]
            estimate = (signatures[rest] == signatures[kept]).mean(axis=1)
            is_exact = hashes[rest] == hashes[kept]
            is_removed = is_exact | (estimate >= 0.8)
            found += [
                dedup.Duplicate(int(number), kept, float(value), bool(exact))
                for number, value, exact in zip(rest[is_removed], estimate[is_removed], is_exact[is_removed], strict=True)
            ]
            left = rest[~is_removed]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_band_by_band_out_of_files_gives_what_all_at_once_gives(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    num_documents = 1500
    signatures = rng.integers(0, 2**32, (num_documents, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    for copy, original in rng.integers(0, num_documents, (600, 2)):  # chains of copies, each changed in up to a third
        signatures[copy] = signatures[original]
        signatures[copy, rng.integers(0, dedup.NUM_PERMUTATIONS, rng.integers(0, 40))] = copy
    signatures[::40, :8] = 7  # a template
    hashes = rng.integers(0, 10 * num_documents, num_documents).astype(np.uint64)
    lengths = rng.integers(0, 20, num_documents)
    expected = found_at_once(signatures, hashes, lengths)
    monkeypatch.setattr(dedup, "_ROWS_AT_ONCE", 7)
    parts = np.split(signatures, np.sort(rng.integers(0, num_documents, 5)))
    assert list(dedup.find_duplicates(parts, hashes, lengths, 0.8, tmp_path)) == expected
    assert 200 < len(expected) < 1000
    assert list(tmp_path.iterdir()) == []


def test_of_a_large_cluster_of_unlike_texts_the_copies_go_and_each_is_like_one_that_is_kept() -> None:
    num_members = 2 * dedup._MAX_KEPT
    signatures = np.random.default_rng(0).integers(0, 2**32, (num_members, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    signatures[:, :8] = 7  # the band of a template, which makes one cluster of all
    signatures[1::2] = signatures[::2]
    signatures[1::2, 20:30] = 5
    hashes = np.arange(num_members, dtype=np.uint64)
    found = list(dedup.find_duplicates([signatures], hashes, np.full(num_members, 9), 0.8))
    assert sorted((item.removed, item.kept) for item in found) == [(odd, odd - 1) for odd in range(1, num_members, 2)]
    assert all(item.similarity == pytest.approx(102 / 112) for item in found)


def test_of_a_large_cluster_only_a_bounded_number_is_compared_with_all_others() -> None:
    """The last two are alike, share no band, and come after a thousand others."""
    num_members = dedup._MAX_KEPT + 3
    signatures = np.random.default_rng(0).integers(0, 2**32, (num_members, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    signatures[-1] = signatures[-2]
    signatures[-1, ::8] = 5
    hashes, lengths, members = np.arange(num_members, dtype=np.uint64), np.full(num_members, 9), np.arange(num_members)
    assert dedup.choose(members, signatures, hashes, lengths, 0.8) == []
    found = dedup.choose(members[3:], signatures, hashes, lengths, 0.8)
    assert [(item.removed, item.kept) for item in found] == [(num_members - 1, num_members - 2)]


def test_a_source_that_loses_too_much_raises_an_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [words(0), words(0), words(0), words(1), words(2)]
    index = pa.table(
        {
            "doc_id": pa.array(range(5), type=pa.uint64()),
            "source": ["a", "a", "a", "b", "b"],
            "reason": pa.array([None, None, None, None, "language"], type=pa.string()),
            "num_chars": [9] * 5,
            "text_hash": pa.array([dedup.text_hash(text) for text in texts], type=pa.uint64()),
            "signature": pa.array([dedup.signature(text).tobytes() for text in texts], type=pa.binary(448)),
        }
    )
    outcome = dedup.RemoveDuplicates(0.8, 0.5)(index)
    assert outcome.removals == [
        Removal(1, "exact_duplicate", "1.00 like 0", 0, 1.0),
        Removal(2, "exact_duplicate", "1.00 like 0", 0, 1.0),
    ]
    assert outcome.report["removed_share_by_source"] == {"a": 0.6667, "b": 0.0}
    assert outcome.report["alarms"] == ["a: 67% removed as duplicates, more than 50%"]
    assert dedup.RemoveDuplicates(0.8, 0.7)(index).report["alarms"] == []
    assert capsys.readouterr().err.count("loses much of itself") == 1
