"""Which adapters are in memory: read beside running traffic, the least recently used make room.

A thread of the store reads and checks files; the engine's thread tries each one between two steps
(`settle`) and only then lets it in. One that fails is never resident and harms no other.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import nn

from data.errors import AdapterRefused, EngineFailure, ToolkitError
from serve.engine.adapter_files import read_adapter
from serve.engine.base import AdapterRef
from serve.engine.lora import LoadedAdapter


@dataclass(eq=False)
class _Load:
    """An adapter on its way in."""

    ref: AdapterRef
    read: Future[LoadedAdapter]
    done: Future[None] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)


class AdapterStore:
    """Adapters in host memory.

    Args:
        sites: The model's modules that adapters may change.
        capacity: Adapters kept at most.
        max_rank: Largest rank accepted.
        base_fingerprint: Of the base that adapters must be trained on; empty accepts any.
        wake: Called from the reading thread when one is ready to be settled.
    """

    def __init__(
        self,
        sites: Mapping[str, nn.Module],
        capacity: int,
        max_rank: int,
        base_fingerprint: str,
        wake: Callable[[], None],
    ):
        self.num_loaded = 0
        self.num_evicted = 0
        self._sites = sites
        self._capacity = capacity
        self._max_rank = max_rank
        self._base_fingerprint = base_fingerprint
        self._wake = wake
        self._resident: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._loads: dict[str, _Load] = {}
        self._unwanted: set[str] = set()
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="hone-adapters")

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def num_bytes(self) -> int:
        """Host memory of the resident adapters."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._resident.values())

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
        """Return a resident adapter and note its use."""
        with self._lock:
            if digest in self._resident:
                self._resident.move_to_end(digest)
            return self._resident.get(digest)

    def start(self, ref: AdapterRef) -> Future[None]:
        """Begin to load an adapter unless it is resident or on its way; any thread may call."""
        with self._lock:
            self._unwanted.discard(ref.digest)
            if ref.digest in self._resident:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            if ref.digest not in self._loads:
                read = self._reader.submit(self._read, ref)
                self._loads[ref.digest] = _Load(ref, read)
                read.add_done_callback(lambda _: self._wake())
            return self._loads[ref.digest].done

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

    def unload(self, digest: str) -> None:
        """Drop an adapter as soon as nothing uses it; `sweep` does it."""
        with self._lock:
            if digest in self._resident:
                self._unwanted.add(digest)

    def sweep(self, in_use: set[str]) -> list[str]:
        """Drop what `unload` named and nothing uses; return the digests."""
        with self._lock:
            gone = [digest for digest in self._unwanted if digest not in in_use]
            for digest in gone:
                self._unwanted.discard(digest)
                self._resident.pop(digest, None)
            return gone

    def close(self) -> None:
        """Stop reading; whoever waits gets an error."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            loads, self._loads = list(self._loads.values()), {}
        for load in loads:
            load.done.set_exception(EngineFailure("The engine was closed.", code="engine_closed"))

    def _read(self, ref: AdapterRef) -> LoadedAdapter:
        adapter = read_adapter(ref, self._sites, self._base_fingerprint)
        if adapter.rank > self._max_rank:
            raise AdapterRefused(
                f"{ref.path}: its rank is {adapter.rank}; this engine serves at most "
                f"{self._max_rank}. Train with a smaller rank, or raise `max_lora_rows`.",
                code="adapter_rank_too_large",
            )
        return adapter

    def _settle_one(
        self, load: _Load, try_out: Callable[[LoadedAdapter], bool], in_use: set[str]
    ) -> ToolkitError | None:
        error: ToolkitError | None = None
        try:
            adapter = load.read.result(timeout=0)
            if not self._make_room(in_use) or not try_out(adapter):
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
                self._resident[load.ref.digest] = adapter
                self.num_loaded += 1
        if error is None:
            load.done.set_result(None)
        else:
            load.done.set_exception(error)
        return error

    def _make_room(self, in_use: set[str]) -> bool:
        with self._lock:
            while len(self._resident) >= self._capacity:
                unused = next((d for d in self._resident if d not in in_use), None)
                if unused is None:
                    return False
                del self._resident[unused]
                self._unwanted.discard(unused)
                self.num_evicted += 1
            return True


_LATER = EngineFailure("no room yet")  # a mark, never raised
