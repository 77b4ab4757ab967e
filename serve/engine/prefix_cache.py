"""Prompts that begin alike are computed once: keys and values are copied from who had them before.

A prompt is named grain by grain: each name is a hash over account, adapter digest and all tokens up
to there, so nobody can find another account's, or another version's. A stream offers its prompt
when it is computed; when it ends well, its block is copied to the far end of the arena and kept
until the room is needed. A stream with a prompt copies the longest match and computes the rest.
Copying, rather than sharing, keeps every sequence in one piece of the arena, where attention reads
it without gathering.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from serve.engine.blocks import Block, BlockPool
from serve.engine.kv_cache import KVCache
from serve.engine.sequence import Stream

GRAIN = 16  # tokens
SHORTEST = 64  # tokens that are worth keeping


@dataclass(eq=False, slots=True)
class _Entry:
    """A block whose first tokens are named by `keys`, one a grain."""

    block: Block
    keys: list[bytes]


class PrefixCache:
    """Finds, copies and keeps the keys and values of common prefixes.

    Attributes:
        num_reused: Tokens that were copied instead of computed.
    """

    def __init__(self, pool: BlockPool, cache: KVCache):
        self.num_reused = 0
        self._pool = pool
        self._cache = cache
        self._kept: OrderedDict[_Entry, None] = OrderedDict()  # least recently used first
        self._live: dict[Stream, _Entry] = {}
        self._places: dict[bytes, _Entry] = {}  # by name of a prefix
        self._version = 0  # counts what was added

    @property
    def num_kept(self) -> int:
        """Tokens of the arena that are kept for later prompts."""
        return sum(entry.block.size for entry in self._kept)

    def allocate(self, num_tokens: int, at_end: bool = False) -> Block | None:
        """Return a block, at the cost of kept ones if need be; None if there is no room."""
        while (block := self._pool.allocate(num_tokens, at_end)) is None:
            if not self._kept:
                return None
            self._drop(next(iter(self._kept)))
        return block

    def reuse(self, stream: Stream) -> None:
        """Copy what is known of a stream's prompt into its block.

        At least one token of the prompt is left to compute, for its logits.
        """
        if stream.prefix_version == self._version or stream.block is None:
            return
        stream.prefix_version = self._version
        keys = self._keys_of(stream)
        for length in range((len(stream.request.prompt_ids) - 1) // GRAIN, 0, -1):
            known, start = length * GRAIN, stream.num_computed
            if known <= start:
                return
            if keys[length - 1] in self._places:
                entry = self._places[keys[length - 1]]
                self._cache.copy(entry.block, stream.block, start, known)
                stream.num_computed = known
                stream.num_cached += known - start
                self.num_reused += known - start
                if entry in self._kept:
                    self._kept.move_to_end(entry)
                return

    def offer(self, stream: Stream) -> None:
        """Let others copy a stream's prompt, which is computed, while it runs."""
        if stream.block is not None and len(stream.request.prompt_ids) >= SHORTEST:
            entry = _Entry(stream.block, self._keys_of(stream))
            self._live[stream] = entry
            self._enter(entry)

    def release(self, stream: Stream, is_finite: bool) -> None:
        """Give a stream's block back, keeping a copy of what may be asked for again."""
        block = stream.block
        if block is None:
            return
        live = self._live.pop(stream, None)
        if live is not None:
            self._leave(live)
        if not is_finite:
            self._cache.scrub(block)
        elif live is not None:
            self._keep(stream, block)
        self._pool.release(block)
        stream.block = None

    def clear(self) -> None:
        """Drop all that is kept."""
        for entry in list(self._kept):
            self._drop(entry)

    def _keep(self, stream: Stream, block: Block) -> None:
        ids = [*stream.request.prompt_ids, *stream.output_ids][: stream.num_computed]
        keys = _names(stream, ids)
        covered = next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._places), 0)
        if covered and (len(keys) - covered) * GRAIN < SHORTEST:
            entry = self._places[keys[covered - 1]]
            if entry in self._kept:
                self._kept.move_to_end(entry)
                return
        copy = self.allocate(len(keys) * GRAIN, at_end=True)
        if copy is not None:
            self._cache.copy(block, copy, 0, len(keys) * GRAIN)
            entry = _Entry(copy, keys)
            self._kept[entry] = None
            self._enter(entry)

    def _enter(self, entry: _Entry) -> None:
        self._version += 1
        for key in entry.keys:
            self._places.setdefault(key, entry)

    def _leave(self, entry: _Entry) -> None:
        for key in entry.keys:
            if self._places.get(key) is entry:
                del self._places[key]

    def _drop(self, entry: _Entry) -> None:
        del self._kept[entry]
        self._leave(entry)
        self._pool.release(entry.block)

    def _keys_of(self, stream: Stream) -> list[bytes]:
        if stream.prefix_keys is None:
            stream.prefix_keys = _names(stream, stream.request.prompt_ids)
        return stream.prefix_keys


def _names(stream: Stream, ids: Sequence[int]) -> list[bytes]:
    """Return the name of each whole grain of a stream's tokens."""
    root = hashlib.blake2b(digest_size=16)
    root.update(f"{stream.request.account}\0{stream.variant or ''}\0".encode())
    names = []
    for start in range(0, len(ids) - GRAIN + 1, GRAIN):
        root.update(array("q", ids[start : start + GRAIN]).tobytes())
        names.append(root.digest())
    return names
