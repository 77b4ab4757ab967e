"""Responses of the policy, sampled by the engine that serves customers.

The engine has a base of its own, or shares the trainer's weights with it (`twin`): while it is
awake they are its, packed as it multiplies them, and asleep it has nothing. It gets the policy's
adapter in memory. Every response has a seed of its own, made of the run's seed, the update and its
place in the batch, so the same policy gives the same responses in a resumed run, and with any
number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from data.errors import InvalidInput
from rlhf.prompts import Prompt
from serve.engine import widened
from serve.engine.base import GenerationRequest, MemoryAdapter, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine
from train.base_model import Base
from train.memory import give_back_freed

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


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model in modules of its own, on the very same parameters.

    What is hooked into one's modules does not reach the other's. To be made before anything is.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


class Sampler:
    """An engine on a base of its own, or on a twin of the trainer's.

    Args:
        max_context: Tokens of prompt and response.
        batch_size: Responses asked for at once.
        stop_at_eos: False: every response has all its tokens.
        shared: A twin of the trainer's model, which computes nothing while the engine is awake;
            None loads another copy, on which the engine stays awake.

    Raises:
        InvalidInput: The base does not read so many tokens.
    """

    def __init__(
        self,
        base: Base,
        device: str,
        max_context: int,
        batch_size: int,
        stop_at_eos: bool,
        shared: PreTrainedModel | None = None,
    ):
        self._base = base
        batch = min(batch_size, MAX_BATCH)
        self._config = EngineConfig(max_batch=batch, max_context=max_context, queue_size=batch_size)
        self._stops = stop_at_eos
        self._shared = shared
        self._engine: LocalEngine | None = None
        if shared is None:
            dtype = str(base.model.dtype).removeprefix("torch.")
            own = LocalEngine.open(base.folder, dtype, device, self._config, base.fingerprint)
            self._engine = self._start(own)

    def close(self) -> None:
        """Give back the engine's thread and memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @contextmanager
    def awake(self) -> Iterator[LocalEngine]:
        """Have the engine for a block; shared weights are the trainer's again after it."""
        if self._engine is not None:
            yield self._engine
            return
        if self._shared is None:
            raise RuntimeError("the sampler is closed")
        base = self._base
        self._engine = self._start(
            LocalEngine(
                self._shared,
                *(base.tokenizer, self._config, base.fingerprint),
                in_bfloat16=self._shared.dtype == torch.bfloat16 and widened.suits(self._shared),
            )
        )
        try:
            yield self._engine
        finally:
            self.close()
            give_back_freed()

    def _start(self, engine: LocalEngine) -> LocalEngine:
        wanted = self._config.max_context
        if wanted is not None and engine.max_context < wanted:
            engine.close()
            raise InvalidInput(
                f"prompt and response may have {wanted} tokens together, but {self._base.name} "
                f"reads at most {engine.max_context}; lower max_prompt_length or max_new_tokens",
                param="max_prompt_length",
            )
        return engine.start()

    def sample(
        self,
        policy: MemoryAdapter | None,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[Sample]:
        """Return one response to each prompt; None as policy is the base."""
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
        with self.awake() as engine:
            if policy is not None:
                engine.load_adapter(policy)
            completions = engine.generate(requests)
            if policy is not None:
                engine.unload_adapter(policy.digest)
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
    """Return a sample as a row of the table of completions; a score that is no number is null."""
    return {
        "line": sample.prompt.line,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "tokens": len(sample.response),
        "ended": sample.ended,
        **{name: None if score != score else score for name, score in scores.items()},
    }
