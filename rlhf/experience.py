"""What an update learns from: responses, their scores, and what the roles say of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import ppo_math
from rlhf.actor_critic import POLICY, REFERENCE, ActorCritic, Micro, make_micro
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_math import Reduce
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rewards import by_length
from rlhf.rollout import Sample


@dataclass
class Experience:
    """This process's part of an update's responses: [b, R] tensors, scores [b].

    Attributes:
        places: Each response's place in the whole batch.
        scores: After clipping and penalties: what the reward is made of.
        raw: As the source gave them.
    """

    samples: list[Sample]
    places: list[int]
    raw: Tensor
    scores: Tensor
    mask: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    entropies: Tensor
    advantages: Tensor
    returns: Tensor
    gap: float

    def __len__(self) -> int:
        return len(self.samples)

    def micro(self, rows: Sequence[int], device: torch.device) -> Micro:
        """Lay out some of the responses."""
        width = max(len(self.samples[row].response) for row in rows)
        texts = [(self.samples[row].prompt.ids, self.samples[row].response) for row in rows]
        return make_micro(texts, width, device)

    def groups(self, rows: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Put rows of similar length together."""
        lengths = [
            len(self.samples[row].prompt.ids) + len(self.samples[row].response) for row in rows
        ]
        return [[rows[index] for index in part] for part in by_length(lengths, max_tokens)]


def shape_scores(
    raw: Sequence[float], samples: Sequence[Sample], settings: PpoRewardSettings, stops: bool
) -> list[float]:
    """Clip scores, and take the penalty from those of responses that do not end."""
    limit = settings.limit
    penalty = settings.missing_eos_penalty if stops else 0.0
    return [
        min(max(score, -limit), limit) - (0.0 if sample.ended else penalty)
        for score, sample in zip(raw, samples, strict=True)
    ]


@torch.no_grad()
def gather(
    roles: ActorCritic,
    samples: Sequence[Sample],
    places: Sequence[int],
    raw: Sequence[float],
    config: PpoConfig,
    kl_coef: float,
    max_tokens: int,
    reduce: Reduce,
) -> Experience:
    """Have the roles read the responses, and work out rewards and advantages.

    Log-probabilities are those of the training pass, never the engine's, so that the first ratio
    is 1 whatever computed the responses.

    Args:
        samples: Of this process; may be none.
        max_tokens: That go through the model at once, with padding.
        reduce: Sums over processes.
    """
    width = max((len(sample.response) for sample in samples), default=1)
    shape = (len(samples), width)
    scores = shape_scores(raw, samples, config.reward, config.stop_at_eos)
    experience = Experience(
        samples=list(samples),
        places=list(places),
        raw=torch.tensor(raw, dtype=torch.float32),
        scores=torch.tensor(scores, dtype=torch.float32),
        mask=torch.zeros(shape, dtype=torch.bool),
        log_probs=torch.zeros(shape),
        ref_log_probs=torch.zeros(shape),
        values=torch.zeros(shape),
        entropies=torch.zeros(shape),
        advantages=torch.zeros(shape),
        returns=torch.zeros(shape),
        gap=math.nan,
    )
    mask = experience.mask
    columns = (
        *(mask, experience.log_probs, experience.ref_log_probs),
        *(experience.values, experience.entropies),
    )
    for index, part in enumerate(experience.groups(range(len(samples)), max_tokens)):
        micro = experience.micro(part, roles.device)
        hidden = roles.hidden(POLICY, micro.ids)
        log_probs, entropies = roles.log_probs(micro, POLICY, hidden)
        values = roles.values(micro, hidden if roles.shared else None)
        if index == 0:
            experience.gap = _gap(roles, micro, hidden, [samples[row] for row in part])
        ref_log_probs, _ = roles.log_probs(micro, REFERENCE)
        found = (micro.mask, log_probs, ref_log_probs, values, entropies)
        for column, told in zip(columns, found, strict=True):
            column[part, : told.shape[1]] = told.to(column)
    rewards = ppo_math.token_rewards(
        experience.log_probs, experience.ref_log_probs, experience.scores, mask, kl_coef
    )
    if config.reward.whiten:
        rewards = ppo_math.whiten(rewards, mask, shift_mean=False, reduce=reduce)
    advantages, returns = ppo_math.advantages_and_returns(
        rewards, experience.values, mask, config.gamma, config.lam
    )
    if config.whiten_advantages:
        advantages = ppo_math.whiten(advantages, mask, reduce=reduce)
    experience.advantages, experience.returns = advantages, returns
    return experience


def response_kl(
    roles: ActorCritic, samples: Sequence[Sample], max_tokens: int
) -> tuple[float, int]:
    """Return the sum over responses of the KL between policy and reference, and their number.

    At each token it is the KL of the two distributions, which has the mean of `log p - log p_ref`
    of tokens drawn from the policy and less variance, and can be told of responses that an earlier
    policy gave.

    Args:
        max_tokens: That go through the model at once, with padding.
    """
    known = [sample for sample in samples if sample.response]
    lengths = [len(sample.prompt.ids) + len(sample.response) for sample in known]
    total = 0.0
    for part in by_length(lengths, max_tokens):
        texts = [(known[index].prompt.ids, known[index].response) for index in part]
        width = max(len(response) for _, response in texts)
        total += float(roles.divergence(make_micro(texts, width, roles.device)).double().sum())
    return total, len(known)


def _gap(roles: ActorCritic, micro: Micro, hidden: Tensor, samples: Sequence[Sample]) -> float:
    """Return the mean |engine - trainer| of the log-probabilities at temperature 1."""
    temperature, roles.temperature = roles.temperature, 1.0
    try:
        log_probs, _ = roles.log_probs(micro, POLICY, hidden)
    finally:
        roles.temperature = temperature
    engine = torch.zeros_like(log_probs)
    for row, sample in enumerate(samples):
        engine[row, : len(sample.log_probs)] = torch.tensor(sample.log_probs)
    return float((engine - log_probs)[micro.mask].abs().mean())
