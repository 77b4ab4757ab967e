"""The formulas of PPO on padded batches: tensors [B, R] of B responses of up to R tokens.

Position t of a response is the choice of its token t; `mask` is true where there is one, and a
response's tokens come first. What is outside the mask never changes a result. All results are
float32 unless the inputs are finer.

References: Schulman et al. 2017 (arXiv:1707.06347), GAE (arXiv:1506.02438), Ziegler et al. 2019
(arXiv:1909.08593) and the code beside it for KL in the reward, the adaptive coefficient, whitening
and value clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WHITEN_EPS = 1e-8
LOG_RATIO_LIMIT = 20.0
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


def last_index(mask: Tensor) -> Tensor:
    """Return the index [B] of each response's last token."""
    return mask.sum(1) - 1


def token_rewards(
    log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Return the reward of each token: minus kl_coef (log p - log p_ref), the score on the last.

    The estimator of the KL in a reward has to be this one (k1): the gradient of the expected sum
    is then that of KL(policy || reference). With k3 it is not, and the policy may collapse.

    Args:
        scores: [B], one a response.
    """
    rewards = -kl_coef * (log_probs - ref_log_probs).masked_fill(~mask, 0.0)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last_index(mask)] += scores.to(rewards.dtype)
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns = advantages + values, 0 outside the mask.

    The value after a response's last token is 0, whether it ended or was cut off.
    """
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    carried = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(carried)
    for step in range(mask.shape[1] - 1, -1, -1):
        valid = mask[:, step]
        delta = rewards[:, step] + gamma * following - values[:, step]
        carried = torch.where(valid, delta + gamma * lam * carried, torch.zeros_like(carried))
        advantages[:, step] = carried
        following = values[:, step]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce = lambda x: x
) -> Tensor:
    """Scale to variance 1 over all valid tokens of all processes; 0 outside the mask.

    Args:
        shift_mean: Also bring the mean to 0; otherwise it stays.
        reduce: Sums over processes.
    """
    valid = values.double().masked_fill(~mask, 0.0)
    total, count = reduce(torch.stack([valid.sum(), mask.sum().double()])).unbind()
    mean = total / count
    spread = reduce((valid - mean).masked_fill(~mask, 0.0).square().sum()) / count
    white = (valid - mean) * torch.rsqrt(spread + WHITEN_EPS)
    if not shift_mean:
        white = white + mean
    return white.masked_fill(~mask, 0.0).to(values.dtype)


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the valid tokens given: divide by the tokens of the whole minibatch.

    Attributes:
        loss: To minimise.
        approx_kl: Of 0.5 (log ratio)^2, Schulman's k2 of old and new policy.
        clipped: Tokens whose clipped term was taken.
        ratio: Of the ratios.
    """

    loss: Tensor
    approx_kl: Tensor
    clipped: Tensor
    ratio: Tensor


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Return the clipped objective, as a sum.

    Args:
        dual_clip: Bound on the loss of a bad token that became likelier, in advantages
            (arXiv:1912.09729); None is none.
    """
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -advantages * dual_clip)
        losses = torch.where(advantages < 0, bounded, losses)
    weight = mask.to(losses.dtype)
    with torch.no_grad():
        approx_kl = 0.5 * (log_ratio.square() * weight).sum()
        num_clipped = ((clipped > plain) & mask).sum()
        ratios = (ratio * weight).sum()
    return PolicyLoss((losses * weight).sum(), approx_kl, num_clipped, ratios)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return 0.5 max((V - R)^2, (clipped V - R)^2) summed, and how many tokens were clipped."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum()
    return loss, ((clipped > plain) & mask).sum()


def sequence_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the sum [B] of log p - log p_ref over each response (k1)."""
    return (log_probs - ref_log_probs).masked_fill(~mask, 0.0).sum(1)


def sequence_kl_k3(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the sum [B] of exp(-d) - 1 + d, d = log p - log p_ref: never negative; for logs."""
    difference = (log_probs - ref_log_probs).masked_fill(~mask, 0.0)
    return ((-difference).exp() - 1 + difference).sum(1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(R - V) / Var(R): 1 for a perfect value, 0 for a constant one."""
    observed = returns[mask].double()
    variance = observed.var(correction=0)
    if len(observed) < 2 or variance == 0:
        return float("nan")
    return float(1 - (observed - values[mask].double()).var(correction=0) / variance)


class AdaptiveKL:
    """Ziegler et al.'s controller: keeps the KL of a response near a target.

    An update of n episodes multiplies the coefficient by 1 +- 0.2 n / horizon at most, so a horizon
    of n / 5 could make it 0, where it stays, or negative, which rewards what it should keep small.

    Args:
        coef: The first coefficient.
        target: KL of a response, nats; None keeps the coefficient as it is.
        horizon: Episodes over which it adapts; above a fifth of an update's.
    """

    def __init__(self, coef: float, target: float | None, horizon: int):
        self.coef = coef
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        """Move the coefficient, by the mean KL of `num_episodes` responses of all processes."""
        if self._target is None:
            return
        error = min(max(kl / self._target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self._horizon
