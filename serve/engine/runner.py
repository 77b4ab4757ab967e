"""The model behind the engine: one forward pass over whatever the scheduler planned.

Takes a transformers model over for the engine's life: puts the arena attention and the LoRA hooks
in place, sizes the KV cache to its budget, and gives the model back as it was on `close`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from data.errors import AdapterRefused, EngineFailure, InvalidInput, ModelUnavailable
from serve.engine import kernels
from serve.engine.adapter_weights import LoadedAdapter, Trial
from serve.engine.attention import IMPLEMENTATION, Group, ProbeStep, Singles, Step
from serve.engine.blocks import SMALLEST, Block, BlockPool, block_size
from serve.engine.forward import Forward, Part, parts_of
from serve.engine.kv_cache import KVCache, bytes_per_token
from serve.engine.lora import LoraBank
from serve.engine.norms import Norms
from serve.engine.projections import Projections, noting_siblings
from serve.engine.scheduler import Work
from serve.engine.widened import widened

PROBE_TOKENS = 4  # what one tile of the kernels takes
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-4, 0.05  # of the logits' norm, at most tokens
# Of the log-probabilities of an adapter's trial, on average: both sides in float32, or not.
TRIAL_TOLERANCE, TRIAL_TOLERANCE_NARROW = 0.02, 0.5
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx")
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# These scale rotary angles by the longest sequence seen, so a batch mate would change the result.
LENGTH_DEPENDENT_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits [K, V] of the rows that were asked for, and each work's share of them.

    Attributes:
        hidden: [K, hidden], what the head was given; empty unless a work embeds its prompt.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    rows: list[tuple[Work, slice]]


class ModelRunner:
    """Runs steps of many sequences.

    Args:
        max_batch: Sequences of a step at most.
        max_context: Longest sequence; None leaves it to the model and the budget.
        kv_budget_bytes: Memory for keys and values of all sequences together; less is taken
            where `max_batch` sequences of `max_context` need less.
        max_lora_rows: Ranks of all adapters of a step together.
        in_bfloat16: Whether products on a CPU round both sides to bfloat16; all else is float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_batch: int,
        max_context: int | None,
        kv_budget_bytes: int,
        max_lora_rows: int,
        in_bfloat16: bool = False,
    ):
        self.model = model
        self.device: torch.device = model.device
        self._previous_attention = model.config._attn_implementation
        model.set_attn_implementation(IMPLEMENTATION)
        try:
            shapes = self._measure()
        except BaseException:
            model.set_attn_implementation(self._previous_attention)
            raise
        dtype = torch.float32 if in_bfloat16 else model.dtype
        self._is_float32 = model.dtype == torch.float32 and not in_bfloat16
        self._has_kernels = in_bfloat16 or kernels.usable(model)
        self._widened = widened(model) if in_bfloat16 else None
        self.bank = LoraBank(model, max_lora_rows, dtype)
        self._projections = Projections(model, self.bank, self._siblings, in_bfloat16)
        self._norms = Norms(model, self._has_kernels)
        self._threads = torch.get_num_threads()
        parts = parts_of(model, self._projections, self._how) if self._has_kernels else None
        tolerance = TOLERANCE_BFLOAT16 if in_bfloat16 else TOLERANCE
        # The kernels' pass on an arena of a few tokens: it tries them, and later adapters.
        self._prober: Forward | None = None
        if parts is not None:
            narrow = torch.bfloat16 if in_bfloat16 else dtype
            small = KVCache(shapes, PROBE_TOKENS, narrow, self.device)
            prober = Forward(model, self.bank, parts, small, PROBE_TOKENS)
            self._prober = prober if self._agrees(prober, tolerance) else None
        kept = torch.bfloat16 if in_bfloat16 and self._prober is not None else dtype
        self.bytes_per_token = bytes_per_token(shapes, kept)
        longest = min(max_context or 2**62, _max_positions(model))
        useful = max_batch * block_size(longest)
        self.pool = BlockPool(min(kv_budget_bytes // self.bytes_per_token, useful))
        if not self.pool.largest:
            self.close()
            raise InvalidInput(
                f"The KV budget of {kv_budget_bytes} bytes is too small: {SMALLEST} tokens take "
                f"{SMALLEST * self.bytes_per_token} bytes. Raise `kv_cache_mb`.",
                param="kv_cache_mb",
            )
        self.max_context = min(longest, self.pool.largest)
        self.cache = KVCache(shapes, self.pool.num_tokens, kept, self.device)
        self._native: Forward | None = None
        if parts is not None and self._prober is not None:
            self._native = Forward(model, self.bank, parts, self.cache, self.max_context)

    def run(self, works: Sequence[Work]) -> StepLogits:
        """Compute the next tokens of every work; keys and values go to the cache."""
        groups: list[Group | Singles] = []
        if self._native:  # the kernels read an adapter once for neighbours that share it
            ordered = sorted(works, key=lambda work: work.stream.variant or "")
        else:
            ordered, groups = self._arrange(works)
        parts: list[Part] = []
        ids: list[int] = []
        keep: list[int] = []
        rows: list[tuple[Work, slice]] = []
        for work in ordered:
            wanted = _wanted_rows(work)
            parts.append(Part(_block(work).offset, work.start, work.num_tokens, wanted))
            rows.append((work, slice(len(keep), len(keep) + wanted)))
            ids += work.stream.tokens(work.start, work.num_tokens)
            keep += range(len(ids) - wanted, len(ids))
        keep_rows = self._tensor(keep)
        self.bank.begin([(w.stream.variant, w.num_tokens) for w in ordered], keep_rows)
        if self._native is not None:
            return StepLogits(*self._native(self._tensor(ids), parts), rows)
        positions = [n for part in parts for n in range(part.start, part.start + part.count)]
        where = [
            part.offset + n for part in parts for n in range(part.start, part.start + part.count)
        ]
        step = Step(self.cache, self._tensor(where), groups)
        with self._noting_hidden(any(w.stream.request.params.embed for w in works)) as noted:
            logits = self._forward(ids, positions, keep_rows, step)
        return StepLogits(logits, noted[0] if noted else logits.new_empty(0), rows)

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """Leave the cores to the kernels' threads in a block, if there are kernels.

        They wait for the next product by spinning; torch's threads would wait for the same cores.
        """
        if self._has_kernels:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def probe(self, adapter: LoadedAdapter, in_use: Iterable[str]) -> bool:
        """Try an adapter on a few tokens; False if there is no room for it now.

        Raises:
            AdapterRefused: Its output is not finite, or not what its trainer recorded.
        """
        trial = adapter.trial
        ids = self._probe_ids if trial is None else self._trial_ids(adapter.digest, trial)
        if not self.bank.activate(adapter, in_use):
            return False
        keep = self._tensor(list(range(PROBE_TOKENS)))
        self.bank.begin([(adapter.digest, PROBE_TOKENS)], keep)
        logits = (
            self._probe_logits(ids)
            if self._prober is None
            else self._native_logits(self._prober, ids)
        )
        try:
            if not bool(logits.isfinite().all()):
                raise AdapterRefused(
                    f"Adapter {adapter.digest}: its output on a probe is not finite; train it "
                    f"again with a smaller learning rate.",
                    code="adapter_not_finite",
                )
            if trial is not None:
                self._compare(adapter.digest, trial, logits)
        except AdapterRefused:
            self.bank.deactivate(adapter.digest)
            raise
        return True

    def _trial_ids(self, digest: str, trial: Trial) -> list[int]:
        """Return a trial's tokens, padded to what a probe takes."""
        ids, vocab_size = list(trial.token_ids), self.model.config.get_text_config().vocab_size
        if len(ids) > PROBE_TOKENS or max(ids) >= vocab_size:
            raise AdapterRefused(
                f"Adapter {digest}: its trial has the tokens {ids}; expected at most "
                f"{PROBE_TOKENS}, each below {vocab_size}. Train it again.",
                code="adapter_invalid_probe",
            )
        return ids + self._probe_ids[len(ids) :]

    def _compare(self, digest: str, trial: Trial, logits: torch.Tensor) -> None:
        """Hold what is served against what the trainer's model said."""
        targets = self._tensor(list(trial.token_ids[1:]))
        log_probs = logits[: len(targets)].float().log_softmax(dim=-1)
        found = log_probs.gather(-1, targets[:, None]).squeeze(-1).cpu()
        mean = float((found - torch.tensor(trial.logprobs)).abs().mean())
        is_exact = self._is_float32 and trial.dtype == "float32"
        allowed = TRIAL_TOLERANCE if is_exact else TRIAL_TOLERANCE_NARROW
        if not mean <= allowed:  # NaN fails too
            raise AdapterRefused(
                f"Adapter {digest}: its log-probabilities on a few tokens are {mean:.2g} from its "
                f"trainer's on average (allowed {allowed}): it would answer differently from what "
                f"was trained. Train it again, or serve with the dtype it was trained in "
                f"({trial.dtype}).",
                code="adapter_probe_mismatch",
            )

    def close(self) -> None:
        """Give the model back as it was."""
        self._native = self._prober = None  # they hold packed weights
        self._norms.close()
        self._projections.close()
        self.bank.close()
        if self._widened is not None:
            self._widened.remove()
        self.model.set_attn_implementation(self._previous_attention)

    def _arrange(self, works: Sequence[Work]) -> tuple[list[Work], list[Group | Singles]]:
        """Order works so that those that attend together lie together."""
        alone = [work for work in works if work.num_tokens == 1]
        chunks = [[work] for work in works if work.num_tokens > 1]
        groups: list[Group | Singles] = []
        ordered: list[Work] = []
        if self._has_kernels and alone:
            blocks, positions = [_block(w) for w in alone], [w.start for w in alone]
            groups.append(Singles(blocks, positions, self._threads))
            ordered = alone
        else:
            by_size: dict[int, list[Work]] = {}
            for work in sorted(alone, key=lambda work: _block(work).offset):
                by_size.setdefault(_block(work).size, []).append(work)
            chunks = [*by_size.values(), *chunks]
        start = len(ordered)
        for members in chunks:
            num_queries = members[0].num_tokens
            blocks = [_block(work) for work in members]
            firsts = [work.start for work in members]
            groups.append(Group(start, blocks, firsts, num_queries, self.device))
            start += len(members) * num_queries
        return [*ordered, *(work for members in chunks for work in members)], groups

    @contextmanager
    def _noting_hidden(self, wanted: bool) -> Iterator[list[torch.Tensor]]:
        """Keep what the head is given in a block, if wanted."""
        noted: list[torch.Tensor] = []
        if not wanted:
            yield noted
            return
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: noted.append(given[0][0]))
        try:
            yield noted
        finally:
            hook.remove()

    def _forward(
        self, ids: list[int], positions: list[int], keep: torch.Tensor, step: Step | ProbeStep
    ) -> torch.Tensor:
        output = self.model(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=keep,
            engine_step=step,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _measure(self) -> dict[int, tuple[int, int, int]]:
        """Learn each layer's shapes from a pass over one token, and that the engine fits it."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
        if kinds:
            raise _unsupported(self.model, f"its layers are of type {', '.join(sorted(kinds))}")
        step = ProbeStep(1, self.device)
        self._siblings: list[list[str]] = []
        with torch.inference_mode(), noting_siblings(self.model, self._siblings):
            self._forward([0], [0], self._tensor([0]), step)
        if len(step.shapes) != config.num_hidden_layers:
            raise _unsupported(self.model, "not all layers use transformers' attention interface")
        self._how = step.how
        return step.shapes

    def _agrees(self, native: Forward, tolerance: float) -> bool:
        """Tell whether the kernels' pass computes what the model does."""
        with torch.inference_mode():
            ids = self._probe_ids
            expected, got = self._probe_logits(ids), self._native_logits(native, ids)
        errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        return bool(errors.median() <= tolerance)  # rounding may hit a single token hard

    def _probe_logits(self, ids: list[int]) -> torch.Tensor:
        """Return the model's logits of a few tokens."""
        places = list(range(PROBE_TOKENS))
        step = ProbeStep(PROBE_TOKENS, self.device)
        return self._forward(ids, places, self._tensor(places), step)

    def _native_logits(self, native: Forward, ids: list[int]) -> torch.Tensor:
        """Return the kernels' logits of the same tokens."""
        part = Part(0, 0, PROBE_TOKENS, PROBE_TOKENS)
        return native(self._tensor(ids), [part])[0]

    @property
    def _probe_ids(self) -> list[int]:
        vocab_size: int = self.model.config.get_text_config().vocab_size
        return [token % vocab_size for token in range(1, 1 + PROBE_TOKENS)]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _block(work: Work) -> Block:
    block = work.stream.block
    if block is None:
        raise EngineFailure(f"Request {work.stream.request.id} runs without a cache block.")
    return block


def _wanted_rows(work: Work) -> int:
    """Return how many of a work's last rows need logits."""
    last = work.start + work.num_tokens >= len(work.stream.request.prompt_ids)
    if work.stream.needs_all_rows and work.stream.in_prompt:
        return work.num_tokens
    return int(last)


def _max_positions(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in POSITION_FIELDS]
    limit = next((int(value) for value in found if value), 2**62)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPES:
        limit = min(limit, int(rope.get("original_max_position_embeddings", limit)))
    return limit


def _unsupported(model: PreTrainedModel, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{type(model).__name__} cannot be served: {reason}. Choose a decoder-only model with "
        f"full or sliding-window attention.",
        code="model_unsupported",
    )
