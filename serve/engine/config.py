"""How much one engine takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from data.errors import InvalidInput

MIB = 2**20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of a `LocalEngine`.

    Attributes:
        max_batch: Sequences that run together.
        max_context: Longest prompt plus completion; None: what model and KV budget allow.
        kv_budget_bytes: Memory for keys and values, taken at start; it bounds how many tokens may
            run together, and the longest context.
        prefill_chunk: Prompt tokens computed in one step while no stream decodes.
        prefill_beside: The same in a step in which streams decode: more reads prompts faster,
            fewer keeps the streams smoother.
        queue_size: Requests that may wait beyond those that run; more get Overloaded.
        adapter_cache_bytes: Host memory for adapters; the least recently used make room.
        max_adapters_per_account: How many of one account may be in memory; None: any number.
        max_lora_rows: Ranks of all adapters of one step together; also the largest rank served.
        watchdog_s: A step or an adapter read longer than this fails its requests.
        request_timeout_s: A request that waits and runs longer than this fails.
    """

    max_batch: int = 16
    max_context: int | None = None
    kv_budget_bytes: int = 1024 * MIB
    prefill_chunk: int = 256
    prefill_beside: int = 64
    queue_size: int = 256
    adapter_cache_bytes: int = 1024 * MIB
    max_adapters_per_account: int | None = None
    max_lora_rows: int = 256
    watchdog_s: float = 120.0
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidInput(f'"{name}" is {value}; expected more than 0', param=name)
