"""One PPO update: passes over its experience, in optimizer steps that own their accumulation.

A minibatch's loss is a mean over all its valid tokens, in all processes, so how it is cut into
micro-batches and shared among processes changes nothing but rounding. Gradients are summed over
processes by one call a step; there is no wrapper around the model that could miss a parameter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from data.errors import TrainingFailed
from rlhf import ppo_math
from rlhf.actor_critic import POLICY, VALUE, ActorCritic
from rlhf.experience import Experience
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_math import Reduce

SUMS = (
    *("loss/policy", "loss/value", "entropy", "approx_kl", "clipped", "ratio"),
    "value_clipped",
)


@dataclass
class UpdateStats:
    """What happened in an update; sums are over valid tokens of all processes.

    Attributes:
        sums: By name; `tokens` counts them.
        norms: Gradient norms before clipping, by role.
        ratios: Mean ratio of each step.
        steps: Optimizer steps.
        epochs: Passes that were done.
    """

    sums: Counter[str] = field(default_factory=Counter)
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ratios: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0

    def mean(self, name: str) -> float:
        """Return a sum's mean over the tokens."""
        return self.sums[name] / max(self.sums["tokens"], 1)


class Learner:
    """Trains policy and value.

    Args:
        max_tokens: That go through the model at once, with padding.
        reduce: Sums a tensor over processes; None where there is one.
    """

    def __init__(
        self,
        roles: ActorCritic,
        config: PpoConfig,
        max_tokens: int,
        reduce: Reduce | None = None,
    ) -> None:
        self._roles = roles
        self._config = config
        self._shares = reduce is not None
        self._reduce: Reduce = reduce or (lambda tensor: tensor)
        self._max_tokens = max_tokens
        self.groups = {POLICY: roles.parameters_of(POLICY), VALUE: roles.parameters_of(VALUE)}
        self._rates = {POLICY: config.learning_rate, VALUE: config.value.learning_rate}
        self.optimizer = torch.optim.AdamW(
            [{"params": self.groups[role], "lr": self._rates[role]} for role in (POLICY, VALUE)],
            eps=config.adam_eps,
            weight_decay=0.0,
        )

    def set_rate(self, share: float) -> None:
        """Set every learning rate to a share of its highest."""
        for group, role in zip(self.optimizer.param_groups, (POLICY, VALUE), strict=True):
            group["lr"] = self._rates[role] * share

    def update(self, experience: Experience, update: int) -> UpdateStats:
        """Learn from a batch.

        Raises:
            TrainingFailed: A loss or gradient is not finite.
        """
        config, stats = self._config, UpdateStats()
        rows_at = {place: row for row, place in enumerate(experience.places)}
        size = config.batch_size // config.num_minibatches
        for epoch in range(config.num_epochs):
            seed = (config.seed * 1_000_003 + update) * 1009 + epoch
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(config.batch_size, generator=generator).tolist()
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                rows = [rows_at[place] for place in chosen if place in rows_at]
                approx_kl = self._step(experience, rows, update < config.value_warmup, stats)
                if config.target_kl is not None and approx_kl > 1.5 * config.target_kl:
                    return stats
            stats.epochs += 1
        return stats

    def _step(
        self, experience: Experience, rows: Sequence[int], value_only: bool, stats: UpdateStats
    ) -> float:
        """Take one optimizer step; returns the approximate KL of new and old policy."""
        tokens = float(self._reduce(experience.mask[rows].sum().double()))
        if tokens == 0:
            return 0.0
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.optimizer.zero_grad(set_to_none=True)
        for part in experience.groups(rows, self._max_tokens):
            for loss in self._losses(experience, part, value_only, sums):
                (loss / tokens).backward()
        found = self._reduce(torch.stack([sums[name] for name in SUMS])).tolist()
        totals = dict(zip(SUMS, found, strict=True))
        self._check_finite(totals)
        for role in (VALUE,) if value_only else (POLICY, VALUE):
            self._share_gradients(self.groups[role])
            norm = float(clip_grad_norm_(self.groups[role], self._config.max_grad_norm))
            self._check_finite({f"the gradient of the {role}": norm})
            stats.norms[role].append(norm)
        self.optimizer.step()
        stats.sums.update(totals | {"tokens": tokens})
        if not value_only:
            stats.ratios.append(totals["ratio"] / tokens)
        stats.steps += 1
        return totals["approx_kl"] / tokens

    def _losses(
        self,
        experience: Experience,
        rows: Sequence[int],
        value_only: bool,
        sums: dict[str, Tensor],
    ) -> Iterator[Tensor]:
        """Yield the summed losses of some responses, and add their parts to `sums`.

        Policy and value with adapters of their own come one after the other, so that the
        activations of one are gone before the other's are made.
        """
        roles = self._roles
        micro = experience.micro(rows, roles.device)
        old = _Old(experience, rows, micro.mask.shape[1], roles.device)
        if roles.shared and not value_only:
            log_probs, entropies, values = roles(micro)
            policy = self._policy_loss(log_probs, entropies, old, micro.mask, sums)
            yield policy + self._value_loss(values, old, micro.mask, sums)
            return
        if not value_only:
            log_probs, entropies = roles.log_probs(micro)
            yield self._policy_loss(log_probs, entropies, old, micro.mask, sums)
            del log_probs, entropies
        hidden = None
        if roles.shared:
            with torch.no_grad():  # the head alone learns
                hidden = roles.hidden(POLICY, micro.ids)
        yield self._value_loss(roles.values(micro, hidden), old, micro.mask, sums)

    def _policy_loss(
        self,
        log_probs: Tensor,
        entropies: Tensor,
        old: _Old,
        mask: Tensor,
        sums: dict[str, Tensor],
    ) -> Tensor:
        config = self._config
        found = ppo_math.policy_loss(
            log_probs,
            old("log_probs"),
            old("advantages"),
            mask,
            config.clip_range,
            config.dual_clip,
        )
        entropy = entropies.masked_fill(~mask, 0.0).sum()
        _add(sums, "loss/policy", found.loss)
        _add(sums, "entropy", entropy)
        _add(sums, "approx_kl", found.approx_kl)
        _add(sums, "clipped", found.clipped)
        _add(sums, "ratio", found.ratio)
        return found.loss - config.entropy_coef * entropy

    def _value_loss(
        self, values: Tensor, old: _Old, mask: Tensor, sums: dict[str, Tensor]
    ) -> Tensor:
        settings = self._config.value
        loss, clipped = ppo_math.value_loss(
            values, old("values"), old("returns"), mask, settings.clip_range
        )
        _add(sums, "loss/value", loss)
        _add(sums, "value_clipped", clipped)
        return settings.coef * loss

    def _share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in one call."""
        if not self._shares:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self._reduce(nn.utils.parameters_to_vector(parts))
        start = 0
        for parameter in parameters:
            count = parameter.numel()
            parameter.grad = flat[start : start + count].view_as(parameter)
            start += count

    def _check_finite(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not abs(value) < float("inf"):
                raise TrainingFailed(
                    f"{name} is {value}; the last whole checkpoint is kept. Lower learning_rate, "
                    "or look at the rewards",
                    code="loss_not_finite",
                )


class _Old:
    """Columns of the experience for some rows, cut to their width: [b, R]."""

    def __init__(
        self, experience: Experience, rows: Sequence[int], width: int, device: torch.device
    ):
        self._experience, self._rows, self._width = experience, rows, width
        self._device = device

    def __call__(self, name: str) -> Tensor:
        column: Tensor = getattr(self._experience, name)
        return column[self._rows, : self._width].to(self._device)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value.detach().double().cpu()
