from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from powerhouse.corpora.shards import TokenRows, write_shard
from powerhouse.errors import InputError


def test_rows_come_back_in_the_order_asked_for_across_shards(tmp_path: Path) -> None:
    rows = np.arange(7 * 5, dtype=np.int32).reshape(7, 5)
    write_shard(tmp_path / "rows-00000.arrow", rows[:3])
    write_shard(tmp_path / "rows-00001.arrow", rows[3:])

    shards = TokenRows(tmp_path)

    assert (len(shards), shards.row_length) == (7, 5)
    indices = np.array([6, 0, 3, 2, 6])
    np.testing.assert_array_equal(rows[indices], shards.take(indices))


def test_rows_tell_which_tokens_are_of_one_document(tmp_path: Path) -> None:
    rows = np.arange(3 * 5, dtype=np.int32).reshape(3, 5)
    write_shard(tmp_path / "rows-00000.arrow", rows[:1], [np.array([0])])
    write_shard(tmp_path / "rows-00001.arrow", rows[1:], [np.array([0, 2]), np.array([0, 1, 4])])
    shards = TokenRows(tmp_path)
    np.testing.assert_array_equal(shards.take(np.arange(3)), rows)
    assert shards.take_documents(np.array([2, 0, 1])).tolist() == [[0, 1, 1, 1, 2], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    write_shard(tmp_path / "rows-00001.arrow", rows[1:])
    with pytest.raises(InputError, match="the shards have no column `starts`"):
        TokenRows(tmp_path).take_documents(np.array([1]))


def test_rows_tell_which_tokens_are_learned_and_without_a_word_all_are(tmp_path: Path) -> None:
    rows, learned = np.arange(3 * 4, dtype=np.int32).reshape(3, 4), np.array([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=np.uint8)
    write_shard(tmp_path / "rows-00000.arrow", rows[:2], learned_NR=learned)
    write_shard(tmp_path / "rows-00001.arrow", rows[2:])
    shards = TokenRows(tmp_path)
    assert shards.tells_learned
    taken = shards.take_learned(np.array([2, 1, 0]))
    assert taken.dtype == np.bool_
    assert taken.tolist() == [[True] * 4, [True, False, False, True], [False, True, True, False]]


def test_a_folder_without_shards_or_with_a_cut_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token shards"):
        TokenRows(tmp_path)

    path = tmp_path / "rows-00000.arrow"
    write_shard(path, np.ones((100, 5), dtype=np.int32))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged token shard"):
        TokenRows(tmp_path)
