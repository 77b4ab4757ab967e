"""Which part of the KV arena belongs to which sequence: buddy allocation of token blocks.

A sequence's need (prompt plus completion) is known at admission, so it gets one block, the next
power of two, for its whole life: no preemption, and blocks of one size lie at multiples of it, so
that a batch of them is a strided view of the arena. The price is up to half of a block unused.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 64  # tokens


@dataclass(frozen=True, slots=True)
class Block:
    """`size` tokens from `offset`, a multiple of `size`."""

    offset: int
    size: int

    @property
    def lane(self) -> int:
        """Its index among the blocks of its size."""
        return self.offset // self.size


class BlockPool:
    """Hands out blocks of an arena of `num_tokens`.

    Running sequences take the lowest address: short ones lie densely at the low end, where a batch
    of them is one view. What is only kept takes the highest.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens // SMALLEST * SMALLEST
        self.num_used = 0
        self._free: dict[int, set[int]] = {}
        offset, remaining = 0, self.num_tokens
        while remaining:  # descending powers of two keep every offset a multiple of its size
            size = 1 << (remaining.bit_length() - 1)
            self._free[size] = {offset}
            offset, remaining = offset + size, remaining - size
        self.largest = max(self._free, default=0)

    def allocate(self, num_tokens: int, at_end: bool = False) -> Block | None:
        """Return a block that holds `num_tokens`, or None while there is no room."""
        wanted = block_size(num_tokens)
        choose = max if at_end else min
        candidates = [
            (choose(offsets), size)
            for size, offsets in self._free.items()
            if size >= wanted and offsets
        ]
        if not candidates:
            return None
        offset, size = choose(candidates)
        self._free[size].remove(offset)
        while size > wanted:
            size //= 2
            spare = offset if at_end else offset + size
            offset += size if at_end else 0
            self._free.setdefault(size, set()).add(spare)
        self.num_used += wanted
        return Block(offset, wanted)

    def release(self, block: Block) -> None:
        """Take a block back and join it with its free buddies."""
        offset, size = block.offset, block.size
        self.num_used -= size
        while (buddy := offset ^ size) in self._free.get(size, ()):
            self._free[size].remove(buddy)
            offset, size = min(offset, buddy), size * 2
        self._free.setdefault(size, set()).add(offset)


def block_size(num_tokens: int) -> int:
    """Return the size of the block that holds so many tokens."""
    return max(SMALLEST, 1 << (num_tokens - 1).bit_length())
