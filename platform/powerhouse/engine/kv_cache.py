"""Who holds which block of the KV cache (paged attention: Kwon et al. 2023, section 4), and what is still in it. Plain
numbers, no tensors.

A full block is named by a hash of its tokens and of the name of the block before, so equal names mean equal prefixes. A block
with a name keeps its contents when its last holder lets go, until its room is needed: least recently used first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class BlockPool:
    """Hands out block numbers and takes them back; a block has several holders only by its name."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # with a name and without a holder, least recently used first
        self._num_holders: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return len(self._empty) + len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Give the blocks of the longest run of names that are known, from the first on."""
        blocks = []
        for name in names:
            if name not in self._named:
                break
            blocks.append(self._named[name])
        return blocks

    def can_allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> bool:
        """Whether there are so many blocks beside the shared ones, which are to be held as well."""
        return num_blocks <= self.num_free - sum(block in self._idle for block in shared)

    def allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> list[int]:
        """Hold the shared blocks and so many others, in this order."""
        assert self.can_allocate(num_blocks, shared), f"{num_blocks} blocks asked for, {self.num_free} free"
        for block in shared:
            self._idle.pop(block, None)
            self._num_holders[block] = self._num_holders.get(block, 0) + 1
        new = [self._empty.pop() if self._empty else self._evict() for _ in range(num_blocks)]
        self._num_holders.update(dict.fromkeys(new, 1))
        return [*shared, *new]

    def name(self, block: int, name: bytes) -> None:
        """Remember what is in a block that is held; of two with the same name the first is the one that is found."""
        assert block in self._num_holders, f"block {block} is not held"
        if name not in self._named and block not in self._names:
            self._named[name] = block
            self._names[block] = name

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a request's blocks; the last is the first whose room is used, since the others serve without it."""
        for block in reversed(blocks):
            assert block in self._num_holders, f"block {block} is not held"
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                del self._num_holders[block]
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block


class BlockNames:
    """Names of the full blocks of one growing list of tokens, made once each.

    `salt` tells apart what gives other keys and values for the same tokens, such as an adapter.
    """

    def __init__(self, block_size: int, salt: bytes = b"") -> None:
        self.block_size = block_size
        self._salt = blake2b(salt, digest_size=16).digest()
        self._names: list[bytes] = []

    def first(self, num_blocks: int, token_ids: Sequence[int]) -> list[bytes]:
        """Give the names of the first blocks of these tokens."""
        for i in range(len(self._names), num_blocks):
            before = self._names[-1] if self._names else self._salt
            tokens = array("q", token_ids[i * self.block_size : (i + 1) * self.block_size])
            assert len(tokens) == self.block_size, f"block {i} is not full"
            self._names.append(blake2b(tokens.tobytes(), key=before, digest_size=16).digest())
        return self._names[:num_blocks]
