"""Which adapters are in host memory: read beside running traffic, the last used stay.

A thread of the store reads and checks files; the engine's thread tries each one between two steps
(`settle`) and only then lets it in. One that fails is never in memory and harms no other. Memory is
bounded in bytes and, if asked, in adapters of one account, which then makes room among its own.
Pinned adapters stay; they may take half of either bound, so that there is always room for one more.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import nn

from data.errors import AdapterRefused, EngineFailure, StateConflict, ToolkitError
from serve.engine.adapter_files import read_adapter
from serve.engine.adapter_weights import LoadedAdapter
from serve.engine.base import Adapter, AdapterState

REMEMBERED = 10_000  # adapters whose numbers are kept after they have left the memory


@dataclass(eq=False)
class _Load:
    """An adapter on its way in."""

    ref: Adapter
    read: Future[LoadedAdapter]
    done: Future[None] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Record:
    """What is known of an adapter, in memory or gone."""

    owner: str
    rank: int
    num_bytes: int
    num_loads: int = 0
    num_uses: int = 0
    last_used: float | None = None
    pinned: bool = False


class AdapterStore:
    """Adapters in host memory.

    Args:
        sites: The model's modules that adapters may change.
        budget_bytes: Memory for all of them; one may take half of it.
        max_per_account: Adapters of one account at most; None for any number.
        max_rank: Largest rank accepted.
        base_fingerprint: Of the base that adapters must be trained on; empty accepts any.
        wake: Called from the reading thread when one is ready to be settled.
    """

    def __init__(
        self,
        sites: Mapping[str, nn.Module],
        budget_bytes: int,
        max_per_account: int | None,
        max_rank: int,
        base_fingerprint: str,
        wake: Callable[[], None],
    ):
        self.num_loaded = 0
        self.num_evicted = 0
        self._sites = sites
        self._budget_bytes = budget_bytes
        self._max_per_account = max_per_account
        self._max_rank = max_rank
        self._base_fingerprint = base_fingerprint
        self._wake = wake
        self._held: OrderedDict[str, LoadedAdapter] = OrderedDict()  # least recently used first
        self._records: OrderedDict[str, _Record] = OrderedDict()  # likewise; all of `_held`, more
        self._loads: dict[str, _Load] = {}
        self._unwanted: set[str] = set()
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="hone-adapters")

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Host memory of the adapters."""
        with self._lock:
            return self._num_bytes()

    @property
    def num_pinned(self) -> int:
        """How many stay whatever comes."""
        with self._lock:
            return sum(self._records[digest].pinned for digest in self._held)

    @property
    def is_loading(self) -> bool:
        """Whether any adapter is on its way in."""
        return bool(self._loads)

    @property
    def has_ready(self) -> bool:
        """Whether `settle` has something to do."""
        with self._lock:
            return any(load.read.done() for load in self._loads.values())

    def get(self, digest: str) -> LoadedAdapter | None:
        """Return an adapter that is in memory."""
        with self._lock:
            return self._held.get(digest)

    def set_limits(self, budget_bytes: int, max_per_account: int | None) -> None:
        """Change the limits; what is over them goes when the next adapter comes."""
        with self._lock:
            self._budget_bytes, self._max_per_account = budget_bytes, max_per_account

    def note_use(self, digest: str) -> None:
        """Count a request that runs on an adapter in memory."""
        with self._lock:
            self._held.move_to_end(digest)
            self._records.move_to_end(digest)
            record = self._records[digest]
            record.num_uses += 1
            record.last_used = time.time()

    def states(self, resident: Collection[str]) -> list[AdapterState]:
        """Describe all that are remembered, the last used first.

        Args:
            resident: Digests of those in the model's stacks.
        """
        with self._lock:
            return [
                AdapterState(
                    digest,
                    record.owner,
                    self._tier(digest, resident),
                    record.rank,
                    record.num_bytes,
                    record.pinned,
                    record.num_uses,
                    record.num_loads,
                    record.last_used,
                )
                for digest, record in reversed(self._records.items())
            ]

    def start(self, ref: Adapter) -> Future[None]:
        """Begin to load an adapter unless it is here or on its way; any thread may call."""
        with self._lock:
            self._unwanted.discard(ref.digest)
            if ref.digest in self._held:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            known = self._loads.get(ref.digest)
            load = known or _Load(ref, self._reader.submit(self._read, ref))
            self._loads[ref.digest] = load
        if known is None:  # a read that is done already wakes at once, and who wakes takes locks
            load.read.add_done_callback(lambda _: self._wake())
        return load.done

    def settle(
        self, try_out: Callable[[LoadedAdapter], bool], in_use: set[str], timeout_s: float
    ) -> dict[str, ToolkitError | None]:
        """Let in what has been read; return the outcome by digest.

        Args:
            try_out: Raises if the adapter does not work; False leaves it for a later call.
            in_use: Digests that must not make room.
            timeout_s: A read that takes longer fails.
        """
        outcomes: dict[str, ToolkitError | None] = {}
        with self._lock:
            loads = list(self._loads.values())
        for load in loads:
            if not load.read.done() and time.monotonic() - load.began < timeout_s:
                continue
            error = self._settle_one(load, try_out, in_use)
            if error is not _LATER:
                outcomes[load.ref.digest] = error
        return outcomes

    def pin(self, digest: str) -> None:
        """Keep an adapter in memory; one that has gone meanwhile is not pinned.

        Raises:
            StateConflict: Pinned adapters may take half of the memory, or of an account's share.
        """
        with self._lock:
            if digest not in self._held or self._records[digest].pinned:
                return
            record = self._records[digest]
            pinned = [d for d in self._held if self._records[d].pinned]
            taken = sum(self._held[d].num_bytes for d in pinned) + record.num_bytes
            if taken > self._budget_bytes // 2:
                raise StateConflict(
                    f"Pinned adapters would take {taken} bytes, more than half of the "
                    f"{self._budget_bytes} for adapters. Unpin one, or raise `adapter_cache_mb`.",
                    code="too_many_pins",
                )
            own = sum(self._records[d].owner == record.owner for d in pinned) + 1
            if self._max_per_account is not None and own > self._max_per_account // 2:
                raise StateConflict(
                    f"The account would pin {own} adapters, more than half of the "
                    f"{self._max_per_account} that it may have in memory. Unpin one, or raise "
                    f"`max_adapters_per_account`.",
                    code="too_many_pins",
                )
            record.pinned = True

    def unpin(self, digest: str) -> None:
        """Let an adapter make room again."""
        with self._lock:
            if digest in self._records:
                self._records[digest].pinned = False

    def unload(self, digest: str) -> None:
        """Drop an adapter as soon as nothing uses it; `sweep` does it."""
        with self._lock:
            if digest in self._held:
                self._unwanted.add(digest)

    def sweep(self, in_use: set[str]) -> list[str]:
        """Drop what `unload` named and nothing uses; return the digests."""
        with self._lock:
            gone = [digest for digest in self._unwanted if digest not in in_use]
            for digest in gone:
                self._unwanted.discard(digest)
                self._drop(digest)
            return gone

    def close(self) -> None:
        """Stop reading; whoever waits gets an error."""
        self._wake = _nobody  # the engine would hold itself, and its base, until Python looks
        self._reader.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            loads, self._loads = list(self._loads.values()), {}
        for load in loads:
            load.done.set_exception(EngineFailure("The engine was closed.", code="engine_closed"))

    def _read(self, ref: Adapter) -> LoadedAdapter:
        adapter = read_adapter(ref, self._sites, self._base_fingerprint)
        if adapter.rank > self._max_rank:
            raise AdapterRefused(
                f"{ref.path}: its rank is {adapter.rank}; this engine serves at most "
                f"{self._max_rank}. Train with a smaller rank, or raise `max_lora_rows`.",
                code="adapter_rank_too_large",
            )
        if adapter.num_bytes > self._budget_bytes // 2:
            raise AdapterRefused(
                f"{ref.path}: it takes {adapter.num_bytes} bytes, more than half of the "
                f"{self._budget_bytes} for adapters. Raise `adapter_cache_mb`.",
                code="adapter_too_large",
            )
        return adapter

    def _settle_one(
        self, load: _Load, try_out: Callable[[LoadedAdapter], bool], in_use: set[str]
    ) -> ToolkitError | None:
        error: ToolkitError | None = None
        try:
            adapter = load.read.result(timeout=0)
            if not self._make_room(adapter, load.ref.owner, in_use) or not try_out(adapter):
                return _LATER
        except ToolkitError as refusal:
            error = refusal
        except TimeoutError:
            error = EngineFailure(f"{load.ref.path}: reading the adapter takes too long; disk?")
        except Exception as cause:  # noqa: BLE001 - told to whoever waits for this adapter
            error = EngineFailure(f"{load.ref.path}: {type(cause).__name__}: {cause}")
        with self._lock:
            self._loads.pop(load.ref.digest, None)
            if error is None:
                self._let_in(adapter, load.ref.owner)
        if error is None:
            load.done.set_result(None)
        else:
            load.done.set_exception(error)
        return error

    def _let_in(self, adapter: LoadedAdapter, owner: str) -> None:
        self._held[adapter.digest] = adapter
        self.num_loaded += 1
        record = self._records.setdefault(
            adapter.digest, _Record(owner, adapter.rank, adapter.num_bytes)
        )
        record.owner = owner
        record.num_loads += 1
        self._records.move_to_end(adapter.digest)
        if len(self._records) > REMEMBERED:
            gone = next((d for d in self._records if d not in self._held), None)
            if gone is not None:
                del self._records[gone]

    def _make_room(self, adapter: LoadedAdapter, owner: str, in_use: set[str]) -> bool:
        with self._lock:
            while True:
                own = [d for d in self._held if self._records[d].owner == owner]
                if self._max_per_account is not None and len(own) >= self._max_per_account:
                    candidates = own
                elif self._num_bytes() + adapter.num_bytes > self._budget_bytes:
                    candidates = list(self._held)
                else:
                    return True
                unused = (d for d in candidates if d not in in_use and not self._records[d].pinned)
                digest = next(unused, None)
                if digest is None:
                    return False
                self._drop(digest)
                self.num_evicted += 1

    def _drop(self, digest: str) -> None:
        self._held.pop(digest, None)
        self._unwanted.discard(digest)
        if digest in self._records:
            self._records[digest].pinned = False

    def _num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._held.values())

    def _tier(self, digest: str, resident: Collection[str]) -> str:
        if digest not in self._held:
            return "disk"
        return "resident" if digest in resident else "memory"


def _nobody() -> None:
    """Wake nobody."""


_LATER = EngineFailure("no room yet")  # a mark, never raised
