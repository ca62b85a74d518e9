from __future__ import annotations

import numpy as np
import pytest

from powerhouse.corpora import dedup


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
    return [(item.removed, item.kept, item.is_exact) for item in dedup.find_duplicates(signatures, hashes, lengths, threshold)]


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
    found = (dedup.band_keys(left) == dedup.band_keys(right)).any(axis=1).mean()
    theory = 1 - (1 - 0.8 ** (dedup.NUM_PERMUTATIONS // dedup.NUM_BANDS)) ** dedup.NUM_BANDS
    assert abs(found - theory) < 0.02


def test_edges_are_stars_around_the_first_of_each_key() -> None:
    left, right = dedup.edges(np.array([3, 3, 3, 5, 8, 8], dtype=np.uint64), np.array([10, 11, 12, 20, 30, 31]))
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(10, 11), (10, 12), (30, 31)]


def test_no_documents_give_no_duplicates() -> None:
    empty = np.empty((0, dedup.NUM_PERMUTATIONS), dtype=np.uint32)
    assert dedup.find_duplicates(empty, np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64), 0.8) == []
