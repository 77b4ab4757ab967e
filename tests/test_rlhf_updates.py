"""PPO's optimizer steps: invariances, exact counts, and optima that are known in closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from data.errors import TrainingFailed
from rlhf import ppo_math
from rlhf.actor_critic import (
    POLICY,
    REFERENCE,
    VALUE,
    ActorCritic,
    copy_adapter,
    make_micro,
    with_policy,
)
from rlhf.experience import gather
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_setup import Team
from rlhf.prompts import Prompt
from rlhf.rollout import Sample
from rlhf.updates import Learner, UpdateStats
from rlhf.watch import measure

PROMPT = Prompt(1, (1, 2, 3), "prompt")


def config(**values) -> PpoConfig:
    defaults = {
        "prompts_file": "p.jsonl",
        "output_dir": "o",
        "reward": {"function": "m:f", "clip": None, "missing_eos_penalty": 0},
        "value": {"warmup_updates": 0},
        "batch_size": 6,
        "total_episodes": 6,
    }
    return PpoConfig.model_validate(defaults | values)


def make_roles(temperature: float = 0.7, seed: int = 0, model=None) -> ActorCritic:
    torch.manual_seed(seed)
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft = with_policy(model or tiny_model("llama"), LoraConfig(**lora, init_lora_weights=False))
    copy_adapter(peft, POLICY, REFERENCE)
    peft.add_adapter(VALUE, LoraConfig(**lora))
    roles = ActorCritic(peft, temperature)
    roles.add_head(VALUE)
    roles.freeze_all_but((POLICY, VALUE))
    return roles


def samples(count: int = 6) -> list[Sample]:
    made = []
    generator = torch.Generator().manual_seed(5)
    for index in range(count):
        length = 1 + index % 4
        response = tuple(torch.randint(5, 200, (length,), generator=generator).tolist())
        made.append(Sample(PROMPT, response, "", True, (0.0,) * length))
    return made


def experience_of(roles, settings, given=None, raw=None, max_tokens=1000):
    given = samples() if given is None else given
    raw = [float(index % 3) - 1 for index in range(len(given))] if raw is None else raw
    return gather(
        *(roles, given, range(len(given)), raw, settings, 0.1, max_tokens),
        reduce=lambda tensor: tensor,
    )


def gradients(max_tokens: int, rows=None) -> list[torch.Tensor]:
    """The gradients of the first step, summed loss over tokens, with micro-batches of a size."""
    roles = make_roles()
    settings = config(learning_rate=1e-9, num_epochs=1, max_grad_norm=1e9)
    learner = Learner(roles, settings, max_tokens)
    learner.update(experience_of(roles, settings, max_tokens=max_tokens), 0)
    return [p.grad for role in (POLICY, VALUE) for p in roles.parameters_of(role)]


def test_the_gradient_does_not_depend_on_the_micro_batch():
    whole = gradients(10_000)
    for max_tokens in (1, 12):
        for one, other in zip(gradients(max_tokens), whole, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_optimizer_steps_are_epochs_times_minibatches():
    for epochs, minibatches in ((1, 1), (4, 1), (2, 3), (3, 6)):
        roles = make_roles()
        settings = config(num_epochs=epochs, num_minibatches=minibatches)
        learner = Learner(roles, settings, 1000)
        stats = learner.update(experience_of(roles, settings), 0)
        taken = {int(state["step"]) for state in learner.optimizer.state.values()}
        assert taken == {epochs * minibatches}
        assert stats.steps == epochs * minibatches


def test_without_a_learning_rate_the_ratio_stays_1():
    for minibatches in (1, 3):
        roles = make_roles()
        settings = config(num_epochs=4, num_minibatches=minibatches)
        learner = Learner(roles, settings, max_tokens=20)
        learner.set_rate(0.0)
        stats = learner.update(experience_of(roles, settings, max_tokens=20), 0)
        assert all(abs(ratio - 1) < 1e-5 for ratio in stats.ratios)
        assert stats.mean("clipped") == 0
        assert stats.mean("approx_kl") < 1e-10


def test_the_first_kl_is_exactly_0_and_the_reward_is_the_score():
    roles = make_roles()
    found = experience_of(roles, config())
    assert torch.equal(found.log_probs, found.ref_log_probs)
    last = ppo_math.last_index(found.mask)
    assert float(found.returns[torch.arange(6), last].sum()) == pytest.approx(
        float(found.scores.sum()), abs=1e-5
    )


def test_the_last_advantage_is_score_minus_kl_minus_value():
    roles = make_roles()
    with torch.no_grad():
        roles.heads[VALUE].weight.normal_()
        for parameter in roles.parameters_of(POLICY):
            parameter.add_(0.01)
    found = experience_of(roles, config(whiten_advantages=False))
    rows, last = torch.arange(6), ppo_math.last_index(found.mask)
    kl = (found.log_probs - found.ref_log_probs)[rows, last]
    wanted = found.scores - 0.1 * kl - found.values[rows, last]
    assert kl.abs().max() > 1e-3
    assert torch.allclose(found.advantages[rows, last], wanted, atol=1e-6)


def test_scores_are_clipped_and_unended_responses_pay():
    settings = config(reward={"function": "m:f", "clip": 2.0, "missing_eos_penalty": 1.0})
    given = [replace(sample, ended=index % 2 == 0) for index, sample in enumerate(samples())]
    found = experience_of(make_roles(), settings, given, [9.0, 9.0, -9.0, -9.0, 0.5, 0.5])
    assert found.scores.tolist() == [2.0, 1.0, -2.0, -3.0, 0.5, -0.5]
    free = settings.model_copy(update={"stop_at_eos": False})
    assert experience_of(make_roles(), free, given, [0.0] * 6).scores.tolist() == [0.0] * 6


@pytest.mark.parametrize(("clip", "share"), [(2.0, 2 / 6), (None, 0.0), (0.4, 5 / 6)])
def test_the_share_of_clipped_scores_counts_the_clip_and_not_the_penalty(clip, share):
    settings = config(reward={"function": "m:f", "clip": clip, "missing_eos_penalty": 1.0})
    given = [replace(sample, ended=index % 2 == 0) for index, sample in enumerate(samples())]
    found = experience_of(make_roles(), settings, given, [3.0, 2.0, -9.0, 0.5, 0.1, -0.5])
    numbers = measure(found, UpdateStats(), {}, Team(0, 1, None), 8, settings.reward.limit)
    assert numbers["score/clipped_frac"] == pytest.approx(share)


def test_a_huge_advantage_gives_a_gradient_of_norm_1_at_most():
    roles = make_roles()
    settings = config(num_epochs=1, whiten_advantages=False)
    learner = Learner(roles, settings, 1000)
    stats = learner.update(experience_of(roles, settings, raw=[1e6, -1e6] * 3), 0)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in roles.parameters_of(POLICY)))
    assert stats.norms[POLICY][0] > 100
    assert norm <= 1.0 + 1e-4


def test_in_its_warm_up_the_value_learns_alone():
    roles = make_roles()
    settings = config(value={"warmup_updates": 1}, total_episodes=12)
    before = [p.detach().clone() for p in roles.parameters_of(POLICY)]
    learner = Learner(roles, settings, 1000)
    learner.update(experience_of(roles, settings), 0)
    assert all(map(torch.equal, before, roles.parameters_of(POLICY)))
    assert roles.heads[VALUE].weight.abs().sum() > 0
    learner.update(experience_of(roles, settings), 1)
    assert not all(map(torch.equal, before, roles.parameters_of(POLICY)))


def test_an_update_of_the_value_alone_says_nothing_of_the_policy():
    roles = make_roles()
    settings = config(value={"warmup_updates": 1}, total_episodes=12)
    found = experience_of(roles, settings)
    learner, team = Learner(roles, settings, 1000), Team(0, 1, None)
    for update, known in ((0, False), (1, True)):
        numbers = measure(found, learner.update(found, update), {}, team, 8, math.inf)
        names = ("policy/entropy_avg", "policy/approxkl_avg", "loss/policy_avg", "grad_norm/policy")
        assert [math.isfinite(numbers[name]) for name in names] == [known] * 4
        assert math.isfinite(numbers["loss/value_avg"])


def test_the_longest_response_is_that_of_all_processes():
    found = experience_of(make_roles(), config())
    own = int(found.mask.sum(1).max())

    def with_a_response_of_7(value: torch.Tensor) -> torch.Tensor:
        return value + torch.eye(9, dtype=value.dtype)[7] if value.shape == (9,) else value

    for reduce, longest in ((None, own), (with_a_response_of_7, 7)):
        team = Team(0, 1 if reduce is None else 2, reduce)
        numbers = measure(found, UpdateStats(), {}, team, 8, math.inf)
        assert numbers["response/length_max"] == longest


def test_an_update_ends_when_the_policy_moves_too_far():
    roles = make_roles()
    settings = config(num_epochs=10, learning_rate=0.05, target_kl=0.01)
    stats = Learner(roles, settings, 1000).update(experience_of(roles, settings), 0)
    assert 1 <= stats.steps < 10


def test_every_learning_rate_follows_the_schedule():
    learner = Learner(make_roles(), config(), 1000)
    learner.set_rate(0.5)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [1.5e-5, 5e-5]
    learner.set_rate(0.0)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.0, 0.0]


def test_a_loss_that_is_not_finite_ends_the_run():
    roles, settings = make_roles(), config()
    found = experience_of(roles, settings)
    found.advantages[0, 0] = math.nan
    with pytest.raises(TrainingFailed, match="loss/policy is nan"):
        Learner(roles, settings, 1000).update(found, 0)


def test_minibatches_and_processes_with_nothing_to_learn_are_no_error():
    roles, settings = make_roles(), config(num_minibatches=6, num_epochs=1)
    found = experience_of(roles, settings, samples(1), [1.0])
    stats = Learner(roles, settings, 1000).update(found, 0)
    assert stats.steps == 1


# ---- known optima ----


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_regularised_optimum_of_a_bandit_is_reached_by_k1_alone(estimator):
    """pi* is proportional to pi_ref exp(r / beta); k3 in the reward drives elsewhere."""
    beta = 2.0
    rewards = torch.tensor([1.0, 0.0, 0.5, -0.5])
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    optimum = (reference + rewards / beta).log_softmax(0)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4096, 1, dtype=torch.bool)
    for update in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - update / 300)
        with torch.no_grad():
            old = logits.log_softmax(0)
            arms = torch.multinomial(old.exp(), 4096, True, generator=generator)
            now, ref = old[arms][:, None], reference[arms][:, None]
            shaped = ppo_math.token_rewards(now, ref, rewards[arms], mask, beta)
            if estimator == "k3":
                k3 = ppo_math.sequence_kl_k3(now, ref, mask)
                shaped = (rewards[arms] - beta * k3)[:, None]
            advantages = ppo_math.whiten(shaped, mask)
        for _ in range(2):
            found = ppo_math.policy_loss(
                logits.log_softmax(0)[arms][:, None], now, advantages, mask, 0.2
            )
            optimizer.zero_grad()
            (found.loss / 4096).backward()
            optimizer.step()
    policy = logits.detach().log_softmax(0)
    distance = float((policy.exp() * (policy - optimum)).sum())
    if estimator == "k1":
        assert distance < 1e-3
    else:
        assert distance > 0.05


class Enumerated:
    """All responses of up to 3 tokens from 6, of which 0 ends them, to a prompt of one token."""

    def __init__(self, beta: float):
        self.beta = beta
        ended = [
            (*body, 0) for size in range(3) for body in itertools.product(range(1, 6), repeat=size)
        ]
        cut = list(itertools.product(range(1, 6), repeat=3))
        self.responses = [*ended, *cut]
        self.rewards = torch.tensor(
            [sum(token == 2 for token in r) - 0.3 * len(r) for r in self.responses]
        )
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=6,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=False,
        )
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.3)  # or no policy could be far from uniform
        self.roles = make_roles(temperature=1.0, model=model)
        rows = [((5,), response) for response in self.responses]
        self.micro = make_micro(rows, 3, self.roles.device)

    @torch.no_grad()
    def log_probs(self, role: str = POLICY) -> torch.Tensor:
        """Of every response; their probabilities sum to 1."""
        return self.roles.log_probs(self.micro, role)[0].sum(1)

    def objective(self) -> float:
        """E[r] - beta KL(policy || reference), exactly, over the responses."""
        policy, reference = self.log_probs(), self.log_probs(REFERENCE)
        share = policy.exp()
        return float(
            (share * (self.rewards - self.beta * (policy - reference))).sum() / share.sum()
        )

    def best(self) -> float:
        """beta log Z, the objective of the optimum."""
        reference = self.log_probs(REFERENCE)
        assert float(reference.logsumexp(0)) == pytest.approx(0, abs=1e-5)
        return float(self.beta * (reference + self.rewards / self.beta).logsumexp(0))

    def sample(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.multinomial(self.log_probs().exp(), count, True, generator=generator).tolist()


def test_ppo_reaches_the_exact_optimum_of_an_enumerable_model_and_never_exceeds_it():
    world = Enumerated(beta=0.5)
    updates, batch = 60, 256
    settings = config(
        batch_size=batch,
        total_episodes=batch * updates,
        learning_rate=3e-3,
        num_epochs=2,
        temperature=1.0,
        value={"warmup_updates": 5, "learning_rate": 1e-2},
    )
    learner = Learner(world.roles, settings, max_tokens=4096)
    generator = torch.Generator().manual_seed(1)
    start, best, prompt = world.objective(), world.best(), Prompt(1, (5,), "")
    highest = start
    for update in range(updates):
        chosen = world.sample(batch, generator)
        given = [
            Sample(
                prompt,
                world.responses[index],
                "",
                world.responses[index][-1] == 0,
                (0.0,) * len(world.responses[index]),
            )
            for index in chosen
        ]
        raw = [float(world.rewards[index]) for index in chosen]
        found = gather(
            *(world.roles, given, range(batch), raw, settings, world.beta, 4096),
            reduce=lambda tensor: tensor,
        )
        learner.set_rate(1 - update / updates)
        learner.update(found, update)
        highest = max(highest, world.objective())
    reached = world.objective()
    assert start < best - 0.2, "there is something to learn"
    assert reached >= start + 0.95 * (best - start)
    assert highest <= best + 1e-3
