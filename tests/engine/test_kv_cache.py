from __future__ import annotations

import pytest

from powerhouse.engine.kv_cache import BlockPool


def test_a_block_has_one_holder_and_comes_back() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert not pool.can_allocate(1)
    pool.free(first)
    assert pool.can_allocate(3)
    assert not pool.can_allocate(4)
    assert set(pool.allocate(3)) == set(first)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_the_last_block_may_be_part_full(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(num_blocks=4, block_size=16).num_blocks_for(num_tokens) == num_blocks


def test_taking_too_many_or_giving_back_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="block 0 is not held"):
        pool.free(blocks)
