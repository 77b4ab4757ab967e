"""One request on its way through the engine: what it has, what it still needs, what it says."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data.errors import ToolkitError
from serve.engine.adapter_weights import variant_of
from serve.engine.base import (
    FINISH_LENGTH,
    FINISH_STOP,
    Delta,
    GenerationRequest,
    TokenLogprob,
)
from serve.engine.blocks import Block
from serve.engine.detokenize import TextStream
from serve.engine.grammar import Parser

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Stream:
    """The state of a request; only the engine's thread changes it.

    Attributes:
        parser: Of the request's JSON schema.
        num_computed: Tokens whose keys and values are in the cache.
        num_cached: Those of them that came from the prefix cache.
        limit_s: Seconds that it may take.
        deadline: When they end, on the clock of time.monotonic.
        hidden_sum: [hidden] float32, of the prompt's tokens so far that are embedded.
        finish_reason: Set once; no delta follows.
        prefix_keys: Names of the prompt's prefixes, once the prefix cache has made them.
        prefix_version: The state of the prefix cache that was searched last.
    """

    request: GenerationRequest
    on_delta: Callable[[Delta], None]
    tokenizer: Any
    eos_token_ids: frozenset[int]
    parser: Parser | None = None
    limit_s: float = float("inf")
    deadline: float = float("inf")
    block: Block | None = None
    num_computed: int = 0
    num_cached: int = 0
    output_ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    hidden_sum: torch.Tensor | None = None
    finish_reason: str | None = None
    prefix_keys: list[bytes] | None = None
    prefix_version: int = -1

    def __post_init__(self) -> None:
        params, prompt = self.request.params, self.request.prompt_ids
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.text = TextStream(self.tokenizer, prompt, params.stop)
        ends = frozenset() if params.ignore_eos else self.eos_token_ids
        self.stop_ids = params.stop_token_ids | ends
        self._prompt_told = params.prompt_logprobs is None

    @property
    def finished(self) -> bool:
        """Whether the last delta was sent."""
        return self.finish_reason is not None

    @property
    def digest(self) -> str | None:
        """The adapter's, or None for the base."""
        adapter = self.request.adapter
        return None if adapter is None else adapter.digest

    @property
    def variant(self) -> str | None:
        """The adapter at its scale: what the model's stacks and caches know; None for the base."""
        return None if self.digest is None else variant_of(self.digest, self.request.adapter_scale)

    @property
    def max_length(self) -> int:
        """Cache room that the request may need; the last token's keys are never needed."""
        return max(len(self.request.prompt_ids) + self.request.params.max_tokens - 1, 1)

    @property
    def in_prompt(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.num_computed < len(self.request.prompt_ids)

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that cannot be chosen now."""
        return (
            self.stop_ids if len(self.output_ids) < self.request.params.min_tokens else frozenset()
        )

    def tokens(self, start: int, count: int) -> list[int]:
        """Return ids from a position on."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            start -= len(prompt)
            return self.output_ids[start : start + count]
        return list(prompt[start : start + count])

    def accept(self, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> Delta:
        """Take a new token and say what there is to say."""
        params = self.request.params
        self.output_ids.append(token_id)
        self.counts[token_id] += 1
        reason = None
        if self.parser is not None and token_id not in self.stop_ids:
            self.parser.accept(token_id)
        if token_id in self.stop_ids:
            text, reason = self.text.flush(), FINISH_STOP
        else:
            may_stop = len(self.output_ids) >= params.min_tokens
            text, stopped = self.text.push(token_id, may_stop)
            if stopped:
                reason = FINISH_STOP
            elif len(self.output_ids) >= params.max_tokens:
                text, reason = text + self.text.flush(), FINISH_LENGTH
        return self._delta((token_id,), text, logprobs, reason)

    def end(self, reason: str, error: ToolkitError | None = None) -> Delta:
        """Finish without a new token."""
        text = self.text.flush() if reason == FINISH_LENGTH else ""
        delta = self._delta((), text, (), reason, error)
        if self.hidden_sum is None or error is not None:
            return delta
        count = len(self.request.prompt_ids) if self.request.params.pool == "mean" else 1
        return replace(delta, embedding=tuple((self.hidden_sum / count).tolist()))

    @property
    def needs_all_rows(self) -> bool:
        """Whether every token of the prompt must be computed, and reach the head."""
        params = self.request.params
        return (params.embed and params.pool == "mean") or params.prompt_logprobs is not None

    def _delta(
        self,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: str | None,
        error: ToolkitError | None = None,
    ) -> Delta:
        prompt_logprobs = None
        if not self._prompt_told and error is None:
            self._prompt_told, prompt_logprobs = True, tuple(self.prompt_logprobs)
        return Delta(
            self.request.id,
            token_ids,
            text,
            logprobs,
            prompt_logprobs,
            reason,
            error,
            self.num_cached,
        )
