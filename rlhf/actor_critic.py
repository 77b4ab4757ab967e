"""One frozen base with the adapters and heads of all roles on it.

Policy, reference, value and reward are LoRA adapters of one PeftModel; value and reward also have a
linear head. `using` makes a role's adapter the one that computes. It leaves `requires_grad` alone,
unlike PEFT's `set_adapter`, which would silently take the gradients of the others; and layers that
are computed again in a backward pass (gradient checkpointing) get the role of their forward pass.

Rows are padded on the right and run under a causal mask alone, so no mask is ever inferred from ids
and what is in the padding cannot reach a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import ConfigError
from rlhf.token_scores import HeadLogits, Logits, chosen_scores, divergence
from serve.engine.adapter_files import memory_adapter
from serve.engine.base import MemoryAdapter
from train.fused_layers import fuse_layers

POLICY, REFERENCE, VALUE, REWARD = "default", "reference", "value", "reward"  # names in PEFT
BASE = "base"  # no adapter has this name
PADDING_ID = 0  # any id: padding is never read


@dataclass(frozen=True)
class Micro:
    """Rows that go through the model together.

    Attributes:
        ids: [b, T], prompt, response, padding.
        at: [b, R], position in the row from which each response token is predicted; 0 outside
            the mask.
        chosen: [b, R], the response's tokens; 0 outside the mask.
        mask: [b, R].
    """

    ids: Tensor
    at: Tensor
    chosen: Tensor
    mask: Tensor


def make_micro(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, device: torch.device
) -> Micro:
    """Lay out prompts and responses; `width` is R."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), PADDING_ID)
    at, chosen = torch.zeros(2, len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        start, count = len(prompt), len(response)
        ids[index, : start + count] = torch.tensor([*prompt, *response])
        at[index, :count] = torch.arange(start - 1, start + count - 1)
        chosen[index, :count] = torch.tensor(response)
        mask[index, :count] = True
    return Micro(*(tensor.to(device) for tensor in (ids, at, chosen, mask)))


class ActorCritic(nn.Module):
    """The roles.

    Args:
        model: The frozen base with its adapters, made by `with_policy`.
        temperature: Divides the policy's and the reference's logits.
        shared: The value is a head on the policy's adapter.
    """

    def __init__(self, model: PeftModel, temperature: float, shared: bool = False):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.shared = shared
        self.heads = nn.ModuleDict()
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._active = POLICY
        base = self.base
        self._logits = HeadLogits(base)
        self._entropy_trains = False
        model.eval()  # no dropout in any role; modules that drop by configuration:
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
                if getattr(config, name, 0):
                    setattr(config, name, 0.0)

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM under the adapters."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.base.device

    def add_head(self, role: str, weight: Tensor | None = None, bias: float = 0.0) -> None:
        """Give a role a head in float32: the given weight [D], or zeros."""
        width = self.base.config.get_text_config().hidden_size
        head = nn.Linear(width, 1, dtype=torch.float32, device=self.device)
        with torch.no_grad():
            head.weight.zero_() if weight is None else head.weight.copy_(weight.reshape(1, -1))
            head.bias.fill_(bias)
        self.heads[role] = head

    def freeze_all_but(self, roles: Sequence[str]) -> None:
        """Let exactly the adapters and heads of these roles learn."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for role in roles:
            for parameter in self.parameters_of(role):
                parameter.requires_grad_(True)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """Return a role's adapter and head, in a fixed order."""
        found = [p for name, p in self.model.named_parameters() if f".{role}." in f"{name}."]
        if role in self.heads:
            found += list(self.heads[role].parameters())
        return found

    def let_entropy_train(self) -> None:
        """Have gradients flow through the entropies too; costs a second head in each pass."""
        self._entropy_trains = True

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass rather than keep them."""
        self.base.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": self._pinned}
        )
        self.model.train()  # transformers checkpoints in this mode only
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.base.enable_input_require_grads()

    def _pinned(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.using(self._active)

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        """Compute as a role within a block; one without an adapter is the base."""
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: str) -> None:
        self._active = role
        for layer in self._layers:
            layer._active_adapter = [role]

    def hidden(self, role: str, ids: Tensor) -> Tensor:
        """Return the last hidden states [b, T, D] of a role."""
        with self.using(role):
            trunk = self.base.base_model
            return trunk(input_ids=ids, use_cache=False).last_hidden_state

    def log_probs(
        self, micro: Micro, role: str = POLICY, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy [b, R] of a role's choice; 0 outside the mask."""
        hidden = self.hidden(role, micro.ids) if hidden is None else hidden
        with self.using(role):
            scores = chosen_scores(
                self._logits,
                _pick(hidden, micro),
                micro.chosen[micro.mask],
                self.temperature,
                closed_form=self._head_is_frozen() and not self._entropy_trains,
            )
        log_probs, entropies = (_spread(score, micro.mask) for score in scores)
        return log_probs, entropies

    @torch.no_grad()
    def divergence(self, micro: Micro) -> Tensor:
        """Return KL(policy || reference) [b, R] over all tokens, in nats; 0 outside the mask."""
        hidden = [_pick(self.hidden(role, micro.ids), micro) for role in (POLICY, REFERENCE)]
        ours, theirs = self._head_of(POLICY), self._head_of(REFERENCE)
        return _spread(divergence(ours, theirs, hidden, self.temperature), micro.mask)

    def _head_of(self, role: str) -> Logits:
        def logits(hidden: Tensor) -> Tensor:
            with self.using(role):  # an adapter may be on the head too
                return self._logits(hidden)

        return logits

    def values(self, micro: Micro, hidden: Tensor | None = None) -> Tensor:
        """Return the value [b, R] of the state before each token; 0 outside the mask."""
        if hidden is None:
            hidden = self.hidden(POLICY if self.shared else VALUE, micro.ids)
        found = self.heads[VALUE](_pick(hidden, micro).float()).squeeze(-1)
        return _spread(found, micro.mask)

    def rewards(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the reward model's raw score [b] at the last token of each row."""
        micro = make_micro([(row, ()) for row in rows], 0, self.device)
        hidden = self.hidden(REWARD, micro.ids)
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        last = hidden[torch.arange(len(rows), device=self.device), ends]
        return self.heads[REWARD](last.float()).squeeze(-1)

    def embeddings(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the base's mean hidden state over each row, as serving embeds texts: [b, D]."""
        micro = make_micro([(row, ()) for row in rows], 0, self.device)
        hidden = self.hidden(BASE, micro.ids).float()
        lengths = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        inside = torch.arange(hidden.shape[1], device=self.device)[None] < lengths
        return (hidden * inside[..., None]).sum(dim=1) / lengths

    def forward(self, micro: Micro) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's log-probabilities and entropies, and the values, each [b, R]."""
        hidden = self.hidden(POLICY, micro.ids)
        log_probs, entropies = self.log_probs(micro, POLICY, hidden)
        return log_probs, entropies, self.values(micro, hidden if self.shared else None)

    def policy_adapter(self) -> MemoryAdapter:
        """Return a copy of the policy for an engine."""
        return memory_adapter(self.model.peft_config[POLICY].to_dict(), self.adapter_state(POLICY))

    def adapter_state(self, role: str) -> dict[str, Tensor]:
        """Return an adapter's tensors by PEFT's names."""
        return get_peft_model_state_dict(self.model, adapter_name=role, save_embedding_layers=False)

    def _head_is_frozen(self) -> bool:
        head = self.base.get_output_embeddings()
        return not any(parameter.requires_grad for parameter in head.parameters())


def with_policy(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put a fresh policy adapter on a base, which is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fuse_layers(model)
    return get_peft_model(model, config, adapter_name=POLICY)


def load_role(model: PeftModel, folder: Path, role: str) -> None:
    """Add a saved adapter to a base.

    Raises:
        ConfigError: It is no adapter that fits the base.
    """
    try:
        outcome: Any = model.load_adapter(str(folder), role, torch_device=str(model.device))
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            [f"{folder} cannot be loaded as the {role} adapter of this base: {error}"]
        ) from error
    if outcome.unexpected_keys:
        names = ", ".join(sorted(outcome.unexpected_keys)[:5])
        raise ConfigError([f"{folder} does not fit the base; it has no {names}"])


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Add an adapter that starts as a copy of another."""
    config = LoraConfig.from_peft_type(**_plain(model.peft_config[source]))
    model.add_adapter(target, config)
    parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{source}." in f"{name}.":
                parameters[f"{name}.".replace(f".{source}.", f".{target}.")[:-1]].copy_(parameter)


def _plain(config: Any) -> dict[str, Any]:
    return dict(config.to_dict())


def _pick(hidden: Tensor, micro: Micro) -> Tensor:
    """Return the hidden states [N, D] from which the response's tokens are predicted."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None].expand_as(micro.at)
    return hidden[rows[micro.mask], micro.at[micro.mask]]


def _spread(found: Tensor, mask: Tensor) -> Tensor:
    return found.new_zeros(mask.shape).masked_scatter(mask, found)
