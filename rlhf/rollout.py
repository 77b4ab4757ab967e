"""Responses of the policy, sampled by the engine that serves customers.

The engine has a base of its own and gets the policy's adapter in memory. Every response has a seed
of its own, made of the run's seed, the update and its place in the batch, so the same policy gives
the same responses in a resumed run, and with any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.errors import InvalidInput
from rlhf.prompts import Prompt
from serve.engine.base import GenerationRequest, MemoryAdapter, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine
from train.base_model import Base

MAX_BATCH = 64  # sequences that run together
GREEDY_ENOUGH = 0.01  # temperature of evaluations, as in Stiennon et al. 2020


@dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
        response: Token ids, the one that ended it included; never empty.
        log_probs: The engine's own, at temperature 1; to compare with the trainer's.
        ended: By a stop token, not by length.
    """

    prompt: Prompt
    response: tuple[int, ...]
    text: str
    ended: bool
    log_probs: tuple[float, ...]


class Sampler:
    """An engine on a base of its own."""

    def __init__(
        self, base: Base, device: str, max_context: int, batch_size: int, stop_at_eos: bool
    ):
        dtype = str(base.model.dtype).removeprefix("torch.")
        batch = min(batch_size, MAX_BATCH)
        config = EngineConfig(max_batch=batch, max_context=max_context, queue_size=batch_size)
        engine = LocalEngine.open(base.folder, dtype, device, config, base.fingerprint)
        self._engine = engine.start()
        self._stops = stop_at_eos
        if self._engine.max_context < max_context:
            raise InvalidInput(
                f"prompt and response may have {max_context} tokens together, but "
                f"{base.name} reads at most {self._engine.max_context}; lower max_prompt_length or "
                "max_new_tokens",
                param="max_prompt_length",
            )

    def close(self) -> None:
        """Give back the engine's thread and memory."""
        self._engine.close()

    def sample(
        self,
        policy: MemoryAdapter | None,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[Sample]:
        """Return one response to each prompt; None as policy is the base."""
        if policy is not None:
            self._engine.load_adapter(policy)
        requests = [
            GenerationRequest(
                id=f"rollout-{index}",
                prompt_ids=prompt.ids,
                params=SamplingParams(
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    ignore_eos=not self._stops,
                    logprobs=0,
                ),
                adapter=policy,
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        completions = self._engine.generate(requests)
        if policy is not None:
            self._engine.unload_adapter(policy.digest)
        return [
            Sample(
                prompt,
                completion.token_ids,
                completion.text,
                completion.finish_reason == "stop",
                tuple(entry.logprob for entry in completion.logprobs),
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def under_another_name(policy: MemoryAdapter, name: str) -> MemoryAdapter:
    """Return the same policy with caches of its own."""
    return replace(policy, digest=f"{policy.digest}-{name}")


def seed_of(run_seed: int, update: int, index: int) -> int:
    """Return the seed of a response."""
    return ((run_seed * 1_000_003 + update) * 1_000_003 + index) % (1 << 62)


def describe(sample: Sample, **scores: Any) -> Mapping[str, Any]:
    """Return a sample as a row of the table of completions."""
    return {
        "line": sample.prompt.line,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "tokens": len(sample.response),
        "ended": sample.ended,
        **scores,
    }
