"""PPO's formulas against closed forms, brute force and hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf import ppo_math
from rlhf.ppo_math import AdaptiveKL, advantages_and_returns, policy_loss, value_loss, whiten


@pytest.fixture
def ragged():
    """Rewards, values and mask of responses of 5, 1 and 3 tokens, with garbage outside."""
    torch.manual_seed(0)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for row, length in enumerate((5, 1, 3)):
        mask[row, :length] = True
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    return rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 1e6), mask


def brute_force(rewards, values, length, gamma, lam):
    """Sum over all later TD errors, as the definition says (O(T^2), float64)."""
    after = [*values[1:length], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_of_ragged_responses_are_the_definition(ragged, gamma, lam):
    rewards, values, mask = ragged
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    for row, length in enumerate((5, 1, 3)):
        wanted = brute_force(
            rewards[row].double().tolist(), values[row].double().tolist(), length, gamma, lam
        )
        assert advantages[row, :length].tolist() == pytest.approx(wanted, abs=1e-5)
        assert (advantages[row, length:] == 0).all()
    assert torch.equal(returns[mask], (advantages + values)[mask])


def test_with_lambda_1_the_advantage_is_the_rest_of_the_rewards_minus_the_value(ragged):
    rewards, values, mask = ragged
    advantages, _ = advantages_and_returns(rewards, values, mask, 1.0, 1.0)
    rest = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages[mask], (rest - values)[mask], atol=1e-5)


def test_the_last_advantage_is_score_minus_kl_minus_value():
    log_probs, ref = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -2.25, -9.0]])
    values, mask = torch.tensor([[0.3, 0.7, 5.0]]), torch.tensor([[True, True, False]])
    rewards = ppo_math.token_rewards(log_probs, ref, torch.tensor([2.0]), mask, 0.1)
    advantages, _ = advantages_and_returns(rewards, values, mask, 1.0, 0.95)
    assert rewards.tolist() == [pytest.approx([-0.05, 2.0 - 0.025, 0.0])]
    assert float(advantages[0, 1]) == pytest.approx(2.0 - 0.1 * 0.25 - 0.7)


def test_whitening_masked_values_is_whitening_the_valid_ones():
    torch.manual_seed(1)
    values = torch.randn(4, 6) * 3 + 2
    mask = torch.rand(4, 6) > 0.4
    compact = values[mask].double()
    wanted = (compact - compact.mean()) / (compact.var(correction=0) + 1e-8).sqrt()
    assert torch.allclose(whiten(values, mask)[mask].double(), wanted, atol=1e-5)
    kept = whiten(values, mask, shift_mean=False)[mask].double()
    assert torch.allclose(kept, wanted + compact.mean(), atol=1e-5)
    assert (whiten(values, mask)[~mask] == 0).all()


def test_whitening_in_two_processes_is_whitening_in_one():
    torch.manual_seed(2)
    values, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.3
    whole = whiten(values, mask)
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    valid = values.double()
    count = mask.sum().double()
    total = torch.stack([valid[mask].sum(), count])
    spread = (valid[mask] - valid[mask].mean()).square().sum()
    for index, (part, part_mask) in enumerate(halves):
        sums = iter([total, spread])
        mine = whiten(part, part_mask, reduce=lambda _, sums=sums: next(sums))
        assert torch.allclose(mine, whole[2 * index : 2 * index + 2], atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.5, 1.0, -1.2, True),  # better, and already much likelier: no more
        (0.5, 1.0, -0.5, False),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),  # worse, and already much rarer: no more
    ],
)
def test_the_policy_loss_is_clipped_on_the_side_that_gains(ratio, advantage, loss, is_clipped):
    found = policy_loss(
        torch.tensor([[math.log(ratio), 50.0]]),
        torch.zeros(1, 2),
        torch.tensor([[advantage, 7.0]]),
        torch.tensor([[True, False]]),
        clip_range=0.2,
    )
    assert float(found.loss) == pytest.approx(loss)
    assert int(found.clipped) == is_clipped
    assert float(found.ratio) == pytest.approx(ratio)
    assert float(found.approx_kl) == pytest.approx(0.5 * math.log(ratio) ** 2)


def test_dual_clip_bounds_a_bad_token_that_became_much_likelier():
    args = (
        torch.tensor([[math.log(8.0)]]),
        torch.zeros(1, 1),
        torch.tensor([[-1.0]]),
        torch.tensor([[True]]),
        0.2,
    )
    assert float(policy_loss(*args).loss) == pytest.approx(8.0)
    assert float(policy_loss(*args, dual_clip=3.0).loss) == pytest.approx(3.0)


def test_the_value_loss_takes_the_worse_of_plain_and_clipped():
    values, old = torch.tensor([[1.0, 0.1, 9.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[True, True, False]])
    loss, clipped = value_loss(values, old, returns, mask, 0.2)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 0.9**2))
    assert int(clipped) == 1


def test_kl_estimators():
    log_probs, ref = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert ppo_math.sequence_kl(log_probs, ref, mask).tolist() == pytest.approx([0.5])
    wanted = (math.exp(-1) - 1 + 1) + (math.exp(0.5) - 1 - 0.5)
    assert ppo_math.sequence_kl_k3(log_probs, ref, mask).tolist() == pytest.approx([wanted])


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert ppo_math.explained_variance(returns, returns, mask) == 1
    assert ppo_math.explained_variance(torch.full((1, 3), 7.0), returns, mask) == pytest.approx(0)
    assert math.isnan(ppo_math.explained_variance(returns, torch.ones(1, 3), mask))


def test_the_kl_controller_is_the_closed_form():
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 64)
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 64 / 10_000))
    before = controller.coef
    controller.update(600.0, 64)  # an outlier moves it by 20 % of the share at most
    assert controller.coef == pytest.approx(before * (1 + 0.2 * 64 / 10_000))
    fixed = AdaptiveKL(0.2, target=None, horizon=10_000)
    fixed.update(600.0, 64)
    assert fixed.coef == 0.2
