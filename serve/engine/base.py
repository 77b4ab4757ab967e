"""The Engine protocol: what the server, evaluation and rollouts know of any engine.

Requests and answers are plain frozen dataclasses of Python values, so this module imports no torch
and can be used where none is installed. `serve.engine.local` implements the protocol in process.

Log-probabilities are always of the model's own distribution (adapter included), before temperature,
penalties, bias and truncation, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from data.errors import InvalidInput, ToolkitError

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_CANCELLED = "cancelled"
FINISH_ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Presence and frequency penalties follow OpenAI's formula over the tokens generated so far:
    `logit -= frequency_penalty * count + presence_penalty * (count > 0)`. The repetition penalty
    follows Keskar et al. 2019 (CTRL, arXiv 1909.05858, section 4.1) over prompt and completion:
    positive logits are divided by it, negative ones multiplied.

    Attributes:
        max_tokens: Tokens to generate at most; 0 only reads the prompt.
        temperature: 0 takes the most likely token (after penalties and bias).
        top_p: Keep the smallest set of tokens whose probabilities sum to at least this.
        top_k: Keep this many most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one.
        stop: Strings that end the text; never part of it. Not looked for before `min_tokens`.
        stop_token_ids: In addition to the model's EOS ids. A stop token is reported as a token
            but adds no text.
        ignore_eos: Go on after the model's EOS ids; `stop_token_ids` still hold.
        min_tokens: EOS and stop tokens cannot be chosen before this many tokens.
        seed: Draws depend on (seed, position in the completion) only, never on what else is in
            the batch; None takes fresh entropy.
        logprobs: Number of most likely alternatives to report with each token; 0 reports the
            chosen token alone; None reports nothing.
        prompt_logprobs: Likewise for the prompt's tokens.
        json_schema: JSON text of a schema; the completion is JSON that conforms to it, or the start
            of such, and ends when it is whole. Stop strings may end it earlier.
        embed: Only read the prompt (`max_tokens` is 0), and report its embedding.
        pool: What the embedding is: "mean" over the prompt's tokens, or of the "last" one alone.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    embed: bool = False
    pool: Literal["mean", "last"] = "mean"

    def __post_init__(self) -> None:
        if self.embed and self.max_tokens:
            raise InvalidInput(
                f'"max_tokens" is {self.max_tokens}; an embedding generates none, so it must be 0',
                param="max_tokens",
            )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidInput(
                    f'"{name}" is {value}; expected a number from {low:g} to {high:g}', param=name
                )
        if self.top_p == 0:
            raise InvalidInput(
                '"top_p" is 0; expected more than 0 and at most 1 (for greedy choice, '
                'set "temperature" to 0)',
                param="top_p",
            )
        if self.repetition_penalty == 0:
            raise InvalidInput(
                '"repetition_penalty" is 0; expected more than 0 (1 is neutral)',
                param="repetition_penalty",
            )
        if self.min_tokens > self.max_tokens:
            raise InvalidInput(
                f'"min_tokens" is {self.min_tokens}, more than "max_tokens" ({self.max_tokens})',
                param="min_tokens",
            )
        if self.json_schema is not None and (self.min_tokens or self.ignore_eos):
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            raise InvalidInput(
                f'"{name}" cannot be used with a JSON schema, which says when the completion ends',
                param=name,
            )
        if "" in self.stop:
            raise InvalidInput('"stop" holds an empty string; remove it', param="stop")


_INFINITY = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, _INFINITY),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, _INFINITY),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
    ("min_tokens", 0, _INFINITY),
    ("seed", -(2**63), 2**64 - 1),
    ("logprobs", 0, 100),
    ("prompt_logprobs", 0, 100),
)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable adapter version.

    Attributes:
        digest: Stands for the content, and here for whose it is; every cache is keyed by it, never
            by a name.
        path: PEFT directory (adapter_config.json, adapter_model.safetensors).
        owner: Account whose share of the host memory it takes.
    """

    digest: str
    path: str
    owner: str = ""


def engine_key(owner: str, digest: str) -> str:
    """Return what the engine knows an adapter by: two accounts' copies are two adapters."""
    return f"{owner}/{digest}"


@dataclass(frozen=True, slots=True, eq=False)
class MemoryAdapter:
    """An adapter that a trainer hands over without writing it; `memory_adapter` makes one.

    Attributes:
        digest: As of an AdapterRef.
        config: Fields of PEFT's adapter_config.json.
        tensors: torch tensors by the names of PEFT's state dict; never changed afterwards.
    """

    digest: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    owner: str = ""

    @property
    def path(self) -> str:
        """What messages call it."""
        return f"adapter in memory {self.digest[:12]}"


Adapter = AdapterRef | MemoryAdapter


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Where an adapter is, and what was asked of it since the engine started.

    Attributes:
        tier: "resident" in the model's stacks, "memory" on the host, or "disk": it was here.
        num_bytes: Host memory that it takes, or took.
        num_uses: Requests that ran on it.
        num_loads: Times it was read.
        last_used: Unix seconds; None before the first request.
    """

    digest: str
    owner: str
    tier: str
    rank: int
    num_bytes: int
    pinned: bool
    num_uses: int
    num_loads: int
    last_used: float | None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        id: Unique among the requests that the engine holds.
        prompt_ids: Used verbatim; must not be empty.
        adapter: None is the base model.
        account: Admission takes turns between accounts.
        adapter_scale: How much of the adapter is added, from 0 (the base alone) to 1.
        timeout_s: Seconds from now on after which it fails, waiting or running; None takes the
            engine's own limit.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: Adapter | None = None
    account: str = ""
    adapter_scale: float = 1.0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.adapter_scale <= 1:
            raise InvalidInput(
                f'"adapter_scale" is {self.adapter_scale}; expected a number from 0 to 1',
                param="adapter_scale",
            )
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InvalidInput(
                f'"timeout_s" is {self.timeout_s}; expected more than 0', param="timeout_s"
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and (token id, log-probability) of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of a request; the last one carries a finish reason.

    Attributes:
        token_ids: Produced since the last delta, stop and EOS tokens included.
        text: Never ends inside a UTF-8 character, nor inside what may become a stop string; so it
            can lag behind `token_ids`.
        logprobs: One a token if asked, else empty.
        prompt_logprobs: On the first delta, if asked; entry 0 is None.
        finish_reason: None, "stop", "length", "cancelled" or "error".
        error: Set with "error".
        num_cached: Prompt tokens that were taken from the prefix cache.
        embedding: With "length", if asked: the mean over the prompt's tokens of what the model's
            last layer, its final norm included, gives to the head.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    error: ToolkitError | None = None
    num_cached: int = 0
    embedding: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens produced since the last delta."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: its deltas put together."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: str
    num_cached: int = 0
    embedding: tuple[float, ...] | None = None


class Engine(Protocol):
    """Generates tokens from one base model and any number of adapters.

    Attributes:
        max_context: Tokens that prompt and completion of one request may have together.
        eos_token_ids: Tokens that end a completion unless `ignore_eos`.
        fingerprint: Changes with the base weights, the engine's version or its precision.
    """

    max_context: int
    eos_token_ids: frozenset[int]
    fingerprint: str

    def submit(self, request: GenerationRequest, on_delta: Callable[[Delta], None]) -> None:
        """Queue a request; `on_delta` is called on an engine thread and must not block.

        Raises:
            InvalidInput: Empty prompt, token id outside the vocabulary, id already in use.
            ContextTooLong: Prompt plus max_tokens exceed `max_context`.
            Overloaded: The queue is full.
            EngineFailure: The engine is closed.
        """

    def cancel(self, request_id: str) -> None:
        """End a request within one step with reason "cancelled"; unknown ids are ignored."""

    def load_adapter(self, ref: Adapter) -> None:
        """Read and try an adapter, or change nothing; idempotent.

        Raises:
            AdapterRefused: `code` names the check that failed.
        """

    def unload_adapter(self, digest: str) -> None:
        """Drop an adapter from memory, even if pinned; one in use goes after its last request."""

    def pin_adapter(self, ref: Adapter) -> None:
        """Load an adapter and keep it in memory until it is unpinned.

        Raises:
            AdapterRefused: As for `load_adapter`.
            StateConflict: Pinned adapters take half of the memory, or of the account's share.
        """

    def unpin_adapter(self, digest: str) -> None:
        """Let an adapter make room for others again."""

    def adapters(self) -> list[AdapterState]:
        """Return what is known of every adapter that was in use, the last used first."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Run requests to their end and return them in order; raises the first error."""

    def set_limits(
        self,
        *,
        queue_size: int,
        request_timeout_s: float,
        adapter_cache_bytes: int,
        max_adapters_per_account: int | None,
    ) -> None:
        """Change limits for what comes from now on; nothing in memory or in flight is ended."""

    def stats(self) -> dict[str, float]:
        """Return counters and gauges by name."""

    def close(self) -> None:
        """Stop; requests in flight get an error delta."""
