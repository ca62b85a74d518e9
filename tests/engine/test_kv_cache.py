from __future__ import annotations

import pytest

from powerhouse.engine.kv_cache import BlockNames, BlockPool


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


def test_named_blocks_are_found_until_their_room_is_needed_and_the_longest_unused_goes_first() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    for name in (b"a", b"b", b"c"):
        [block] = pool.allocate(1)
        pool.name(block, name)
        pool.free([block])
    assert pool.num_free == 3
    shared = pool.find([b"a"])
    assert pool.find([b"a", b"x", b"b"]) == shared, "a run ends where a name is not known"
    pool.free(pool.allocate(0, shared))
    pool.allocate(1)
    assert [bool(pool.find([name])) for name in (b"a", b"b", b"c")] == [True, False, True]
    pool.allocate(1)
    assert [bool(pool.find([name])) for name in (b"a", b"b", b"c")] == [True, False, False]


def test_a_shared_block_is_free_when_its_last_holder_lets_go_and_is_not_evicted_before() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    first = pool.allocate(1)
    pool.name(first[0], b"a")
    second = pool.allocate(0, pool.find([b"a"]))
    assert second == first
    pool.free(first)
    assert pool.num_free == 1
    assert not pool.can_allocate(2)
    pool.free(second)
    assert not pool.can_allocate(2, shared=first), "what is shared is not free for others"
    assert pool.can_allocate(1, shared=first)


def test_of_a_freed_prefix_the_end_goes_first() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, [b"1", b"2", b"3"], strict=True):
        pool.name(block, name)
    pool.free(blocks)
    pool.allocate(1)
    assert pool.find([b"1", b"2", b"3"]) == blocks[:2]


def test_a_name_tells_the_whole_prefix_and_what_made_its_keys() -> None:
    def name(token_ids: list[int], salt: bytes = b"") -> bytes:
        return BlockNames(2, salt).first(2, token_ids)[1]

    assert name([1, 2, 3, 4]) == name([1, 2, 3, 4, 5])
    assert len({name([1, 2, 3, 4]), name([0, 2, 3, 4]), name([1, 2, 3, 5]), name([1, 2, 3, 4], b"adapter")}) == 4
