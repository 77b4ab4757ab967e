"""The engine in this process: the Engine protocol over a transformers model.

    with LocalEngine(model, tokenizer, EngineConfig(max_batch=8)) as engine:
        [completion] = engine.generate([GenerationRequest("1", prompt_ids, SamplingParams())])

The model belongs to the engine until `close`: its attention is replaced and adapters are hooked in.
This module checks and hands over; `loop.py` does the work on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from data.errors import ContextTooLong, InvalidInput
from serve.engine import base_model, collect, kernels, widened
from serve.engine.adapter_weights import lora_sites
from serve.engine.adapters import AdapterStore
from serve.engine.base import Adapter, AdapterState, Completion, Delta, GenerationRequest
from serve.engine.config import EngineConfig
from serve.engine.grammar import Grammars
from serve.engine.loop import EngineLoop
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Stream

__all__ = ["EngineConfig", "LocalEngine"]

ENGINE_VERSION = 3  # of what it computes: change it when the same request may answer differently


class LocalEngine:
    """Continuous batching of base and adapters on one device.

    Args:
        model: A causal language model of transformers; its dtype and device are the engine's.
        tokenizer: For text and stop strings.
        config: Limits; the defaults suit a small model.
        fingerprint: Of the base weights (`base_model.fingerprint`); adapters trained on another
            base are refused.
        in_bfloat16: Round both sides of matrix products to bfloat16 or finer, and hold adapters,
            keys and values in it; sums, attention and norms are float32. For a model on a CPU whose
            kernels multiply so, see `widened.suits`.

    Raises:
        ModelUnavailable: The model's architecture cannot be served.
        InvalidInput: The KV budget does not hold even a short sequence, or `in_bfloat16` is asked
            of a model or processor that it is not for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: EngineConfig | None = None,
        fingerprint: str = "",
        in_bfloat16: bool = False,
    ):
        if in_bfloat16 and not widened.suits(model):
            raise InvalidInput(
                f"Products in bfloat16 are for models on a CPU with AVX512-BF16 or AVX512-VNNI "
                f"and a C compiler; this one is {type(model).__name__}, {model.dtype} on "
                f"{model.device.type}.",
                param="in_bfloat16",
            )
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self._runner = ModelRunner(
            model.eval(),
            self.config.max_batch,
            self.config.max_context,
            self.config.kv_budget_bytes,
            self.config.max_lora_rows,
            in_bfloat16,
        )
        self._adapters = AdapterStore(
            lora_sites(model),
            self.config.adapter_cache_bytes,
            self.config.max_adapters_per_account,
            self.config.max_lora_rows,
            fingerprint,
            wake=lambda: self._loop.rouse(),
        )
        self._loop = EngineLoop(self._runner, self._adapters, self.config)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self.max_context = self._runner.max_context
        self.eos_token_ids = _eos_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self._vocab_size, self.eos_token_ids)
        #: What matrix products are computed in.
        self.dtype = "bfloat16" if in_bfloat16 else str(model.dtype).removeprefix("torch.")
        self.fingerprint = f"{fingerprint}+engine{ENGINE_VERSION}.{self.dtype}"

    @classmethod
    def open(
        cls,
        folder: Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        config: EngineConfig | None = None,
        fingerprint: str = "",
    ) -> Self:
        """Make an engine on a fetched base model; `start` it, or use it as a context.

        Where the kernels multiply bfloat16, that dtype on a CPU means float32 everywhere but in
        matrix products: more exact than a bfloat16 model, and several times faster. "auto" is that
        too for a base of 8-bit weights where they are multiplied as whole numbers.

        Raises:
            ModelUnavailable: See `base_model.load`, and above.
        """
        device = base_model.resolve_device(device)
        resolved = base_model.resolve_dtype(dtype, device)
        products_only = resolved is torch.bfloat16 and device.type == "cpu"
        in_bfloat16 = products_only and kernels.multiply_bfloat16()
        loaded = torch.float32 if in_bfloat16 else resolved
        model, tokenizer = base_model.load(folder, loaded, device)
        if dtype == "auto" and loaded is torch.float32:
            in_bfloat16 = in_bfloat16 or widened.gains(model)
        return cls(model, tokenizer, config, fingerprint, in_bfloat16)

    def start(self) -> Self:
        """Start the engine's threads; requests are taken from now on."""
        self._loop.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: GenerationRequest, on_delta: Callable[[Delta], None]) -> None:
        """Queue a request; see `Engine.submit`."""
        self._check(request)
        schema = request.params.json_schema
        parser = None if schema is None else self._grammars.parser(schema)
        self._loop.submit(Stream(request, on_delta, self.tokenizer, self.eos_token_ids, parser))

    def cancel(self, request_id: str) -> None:
        """End a request within one step; see `Engine.cancel`."""
        self._loop.cancel(request_id)

    def load_adapter(self, ref: Adapter) -> None:
        """Read and try an adapter; see `Engine.load_adapter`. Not from within `on_delta`."""
        self._loop.check_running()
        done = self._adapters.start(ref)
        self._loop.rouse()
        done.result()

    def unload_adapter(self, digest: str) -> None:
        """Drop an adapter from memory; see `Engine.unload_adapter`."""
        self._adapters.unload(digest)
        self._loop.rouse()

    def pin_adapter(self, ref: Adapter) -> None:
        """Keep an adapter in memory; see `Engine.pin_adapter`. Not from within `on_delta`."""
        self.load_adapter(ref)
        self._adapters.pin(ref.digest)

    def unpin_adapter(self, digest: str) -> None:
        """Let an adapter make room again; see `Engine.unpin_adapter`."""
        self._adapters.unpin(digest)

    def adapters(self) -> list[AdapterState]:
        """Describe adapters, the last used first; see `Engine.adapters`."""
        return self._adapters.states(self._runner.bank.digests)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Run requests to their end; see `Engine.generate`.

        Those that the queue holds come in together, so the same requests to an idle engine take
        the same steps, and give the same bits.
        """
        limit = self.config.max_batch + self.config.queue_size
        together = self._loop.together() if len(requests) <= limit else nullcontext()
        return collect.generate(self, requests, together)

    def set_limits(
        self,
        *,
        queue_size: int,
        request_timeout_s: float,
        adapter_cache_bytes: int,
        max_adapters_per_account: int | None,
    ) -> None:
        """Change limits; see `Engine.set_limits`."""
        self.config = replace(
            self.config,
            queue_size=queue_size,
            request_timeout_s=request_timeout_s,
            adapter_cache_bytes=adapter_cache_bytes,
            max_adapters_per_account=max_adapters_per_account,
        )
        self._loop.configure(self.config)
        self._adapters.set_limits(adapter_cache_bytes, max_adapters_per_account)

    def stats(self) -> dict[str, float]:
        """Return gauges, and counters by names that end in `_total`."""
        pool = self._runner.pool
        return {
            **self._loop.stats(),
            "kv_bytes": pool.num_tokens * self._runner.bytes_per_token,
            "kv_tokens": pool.num_tokens,
            "kv_tokens_reserved": pool.num_used,
            "adapters_resident": len(self._runner.bank.digests),
            "adapters_in_memory": len(self._adapters),
            "adapters_pinned": self._adapters.num_pinned,
            "adapters_bytes": self._adapters.num_bytes,
            "adapter_loads_total": self._adapters.num_loaded,
            "adapter_evictions_total": self._adapters.num_evicted,
        }

    def close(self) -> None:
        """Stop; requests in flight get an error delta, and the model is given back."""
        if self._loop.close():
            self._runner.close()

    def _check(self, request: GenerationRequest) -> None:
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise InvalidInput("The prompt is empty; give at least one token.", param="prompt")
        total = len(prompt) + params.max_tokens
        if total > self.max_context:
            raise ContextTooLong(
                f"This model's maximum context length is {self.max_context} tokens. However, you "
                f"requested {total} tokens ({len(prompt)} in the prompt; {params.max_tokens} for "
                f"the completion). Please reduce the length of the prompt or completion."
            )
        self._check_ids("prompt", prompt)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidInput(
                f'"{name}" holds token id {wrong}; expected 0 to {self._vocab_size - 1}',
                param=name,
            )


def _eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Return what the model's generation config and the tokenizer call the end."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None)
