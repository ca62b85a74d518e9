"""Who holds which block of the KV cache (paged attention: Kwon et al. 2023, section 4). Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block numbers and takes them back; a block has one holder at most."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free

    def allocate(self, num_blocks: int) -> list[int]:
        assert self.can_allocate(num_blocks), f"{num_blocks} blocks asked for, {self.num_free} free"
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert block in self._held, f"block {block} is not held"
            self._held.remove(block)
            self._free.append(block)
