"""The engine of the rollouts: weights shared with the trainer, and what is read together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_base

from data.errors import InvalidInput
from rlhf.actor_critic import POLICY, ActorCritic, make_micro, with_policy
from rlhf.prompts import Prompt
from rlhf.rewards import by_length
from rlhf.rollout import Sampler, seed_of, twin
from train.base_model import Base, load_base
from train.config import LoraSettings, RunConfig
from train.lora import lora_config

PROMPTS = [Prompt(i + 1, tuple(range(5 + i, 12 + i)), "") for i in range(6)]
SEEDS = [seed_of(3, 1, index) for index in range(6)]


@pytest.fixture(params=["float32", "bfloat16"])
def base(request, tmp_path: Path) -> Base:
    save_tiny_base(tmp_path / "tiny-base", "llama")
    config = RunConfig(
        base_model=str(tmp_path / "tiny-base"),
        models_dir=tmp_path / "models",
        output_dir=tmp_path / "run",
        dtype=request.param,
        device="cpu",
        threads=1,
    )
    return load_base(config)


def policy_on(base: Base) -> ActorCritic:
    model = with_policy(base.model, lora_config(LoraSettings(r=4), base.model))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return ActorCritic(model, 1.0)


def test_sharing_the_trainers_weights_changes_neither_responses_nor_weights(base: Base):
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    shared = twin(base.model)
    roles = policy_on(base)
    micro = make_micro([(prompt.ids, (7, 8, 9)) for prompt in PROMPTS], 3, torch.device("cpu"))
    with torch.no_grad():
        first = roles.log_probs(micro, POLICY)[0]
    own, lent = (
        Sampler(base, "cpu", 32, 6, stop_at_eos=False),
        Sampler(base, "cpu", 32, 6, stop_at_eos=False, shared=shared),
    )
    policy = roles.policy_adapter()
    answers = []
    for sampler in (own, lent, lent):  # asleep in between
        answers.append(sampler.sample(policy, PROMPTS, SEEDS, 12, 0.7))
        sampler.close()
    if base.model.dtype is torch.bfloat16:  # an engine of its own may round products alone
        answers[0] = answers[1]
    for other in answers[1:]:
        assert [s.response for s in other] == [s.response for s in answers[0]]
        assert [s.log_probs for s in other] == [s.log_probs for s in answers[0]]
    layers = {name.replace(".base_layer", ""): p for name, p in roles.base.named_parameters()}
    assert all(torch.equal(layers[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(roles.log_probs(micro, POLICY)[0], first)


def test_weights_come_back_when_sampling_fails(base: Base):
    before = [value.clone() for value in base.model.parameters()]
    sampler = Sampler(base, "cpu", 32, 6, stop_at_eos=True, shared=twin(base.model))
    with pytest.raises(InvalidInput, match="token id"):
        sampler.sample(None, [Prompt(1, (10**6,), "")], SEEDS[:1], 4, 1.0)
    long = Sampler(base, "cpu", 10**6, 6, stop_at_eos=True, shared=twin(base.model))
    with pytest.raises(InvalidInput, match="lower max_prompt_length"):
        long.sample(None, PROMPTS, SEEDS, 4, 1.0)
    assert all(map(torch.equal, base.model.parameters(), before))


def test_rows_go_together_in_as_few_and_as_even_parts_as_the_limit_allows():
    assert [len(part) for part in by_length([72] * 16, 1024)] == [8, 8]
    assert [len(part) for part in by_length([72] * 16, 512)] == [6, 6, 4]
    assert by_length([], 10) == []
    assert by_length([50, 60], 10) == [[0], [1]]
