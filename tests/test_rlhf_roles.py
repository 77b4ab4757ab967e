"""One base with all roles on it: gradients, isolation, invariances, and what is saved."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model

from rlhf import ppo_state
from rlhf.actor_critic import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    ActorCritic,
    copy_adapter,
    make_micro,
    with_policy,
)
from rlhf.token_scores import HeadLogits, chosen_scores

ROWS = [((1, 2, 3), (4, 5)), ((7,), (8, 9, 10, 11)), ((9, 9, 9, 9, 2), (6, 2, 2))]
TEMPERATURE = 0.7


def lora(**values) -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **values,
    )


def make_roles(arch: str = "llama", shared: bool = False) -> ActorCritic:
    torch.manual_seed(0)
    model = with_policy(tiny_model(arch), lora())
    copy_adapter(model, POLICY, REFERENCE)
    model.add_adapter(REWARD, lora())
    if not shared:
        model.add_adapter(VALUE, lora())
    roles = ActorCritic(model, TEMPERATURE, shared)
    roles.add_head(REWARD, torch.randn(roles.base.config.get_text_config().hidden_size))
    roles.add_head(VALUE, torch.randn(roles.base.config.get_text_config().hidden_size))
    roles.freeze_all_but((POLICY, VALUE))
    return roles


def alone(arch: str, roles: ActorCritic, role: str) -> PeftModel:
    """A model of its own with one role's adapter, as PEFT has it."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(arch), lora())
    state = {name: tensor.clone() for name, tensor in roles.adapter_state(role).items()}
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state)
    return model.eval()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "qwen3"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_log_probs_are_those_of_the_model_token_by_token(arch):
    roles = make_roles(arch)
    micro = make_micro(ROWS, 4, roles.device)
    with torch.no_grad():
        found, entropies = roles.log_probs(micro, POLICY)
    model = alone(arch, roles, POLICY)
    for row, (prompt, response) in enumerate(ROWS):
        for step, token in enumerate(response):
            ids = torch.tensor([[*prompt, *response[:step]]])
            with torch.no_grad():
                every = (model(input_ids=ids).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            assert float(found[row, step]) == pytest.approx(float(every[token]), abs=2e-5)
            wanted = -(every.exp() * every).sum()
            assert float(entropies[row, step]) == pytest.approx(float(wanted), abs=2e-4)
        assert (found[row, len(response) :] == 0).all()


def test_batch_mates_and_padding_change_nothing():
    roles = make_roles()
    with torch.no_grad():
        together = roles(make_micro(ROWS, 4, roles.device))
        for row, one in enumerate(ROWS):
            apart = roles(make_micro([one], 4, roles.device))
            for all_rows, single in zip(together, apart, strict=True):
                assert torch.allclose(all_rows[row], single[0], atol=1e-5)


def test_what_is_in_the_padding_is_never_read():
    roles = make_roles()
    micro = make_micro(ROWS, 4, roles.device)
    with torch.no_grad():
        before = roles(micro)
        for row, (prompt, response) in enumerate(ROWS):
            micro.ids[row, len(prompt) + len(response) :] = 77
        after = roles(micro)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("value_first", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_gradients_of_a_joint_step_are_those_of_separate_models(checkpointing, value_first):
    roles = make_roles()
    models = {role: alone("llama", roles, role) for role in (POLICY, VALUE)}
    if checkpointing:
        roles.checkpoint_activations()
    micro = make_micro(ROWS, 4, roles.device)
    log_probs, _, values = roles(micro)
    losses = [log_probs.sum(), values.square().sum()]
    if value_first:  # the role active at the time of a backward pass must not matter
        losses.reverse()
    for loss in losses:
        loss.backward()

    wanted: dict[str, list[torch.Tensor]] = {}
    for role, model in models.items():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        total = torch.zeros(())
        for prompt, response in ROWS:
            output = model(
                input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True
            )
            span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            if role == POLICY:
                every = (output.logits[0, span] / TEMPERATURE).log_softmax(-1)
                total = total + every.gather(-1, torch.tensor(response)[:, None]).sum()
            else:
                head = copy.deepcopy(roles.heads[VALUE]).requires_grad_(False)
                total = total + head(output.hidden_states[-1][0, span]).square().sum()
        total.backward()
        wanted[role] = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    for role, grads in wanted.items():
        found = [p.grad for p in roles.parameters_of(role)][: len(grads)]
        for mine, theirs in zip(found, grads, strict=True):
            assert torch.allclose(mine, theirs, atol=2e-4, rtol=1e-3), role
    frozen = [*roles.parameters_of(REFERENCE), *roles.parameters_of(REWARD)]
    assert all(parameter.grad is None for parameter in frozen)


def test_the_value_loss_leaves_the_policy_alone_unless_the_trunk_is_shared():
    for shared in (False, True):
        roles = make_roles(shared=shared)
        _, _, values = roles(make_micro(ROWS, 4, roles.device))
        values.sum().backward()
        touched = any(
            p.grad is not None and bool(p.grad.abs().sum() > 0) for p in roles.parameters_of(POLICY)
        )
        assert touched == shared


def test_switching_roles_leaves_requires_grad_alone():
    roles = make_roles()
    before = {name: p.requires_grad for name, p in roles.named_parameters()}
    with roles.using(REFERENCE), roles.using(REWARD):
        pass
    assert {name: p.requires_grad for name, p in roles.named_parameters()} == before


def test_the_reward_is_the_head_on_the_last_token_even_if_it_looks_like_padding():
    roles = make_roles()
    rows = [(1, 2, 3, 0), (4, 0), (5, 6, 7, 8, 9)]
    with torch.no_grad():
        found = roles.rewards(rows).tolist()
        model = alone("llama", roles, REWARD)
        for row, score in zip(rows, found, strict=True):
            hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            wanted = roles.heads[REWARD](hidden[-1][0, -1])
            assert score == pytest.approx(float(wanted), abs=1e-5)


def test_the_saved_policy_loads_with_plain_peft(tmp_path: Path):
    roles = make_roles()
    ppo_state.save_policy(roles, tmp_path, "tiny")
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), roles.using(POLICY):
        assert torch.equal(roles.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_frozen_tensors_stay_what_they_were_through_updates():
    roles = make_roles()

    def digest() -> str:
        learned = {id(p) for role in (POLICY, VALUE) for p in roles.parameters_of(role)}
        total = hashlib.sha256()
        for _, parameter in sorted(roles.named_parameters()):
            if id(parameter) not in learned:
                total.update(parameter.detach().numpy().tobytes())
        return total.hexdigest()

    before = digest()
    optimizer = torch.optim.AdamW([p for p in roles.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        log_probs, _, values = roles(make_micro(ROWS, 4, roles.device))
        (log_probs.sum() + values.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest() == before


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_closed_form_of_the_head_is_what_autograd_says(arch):
    model = tiny_model(arch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(3)
    hidden = torch.randn(11, model.config.hidden_size)
    chosen = torch.randint(0, model.config.vocab_size, (11,))
    weights = torch.randn(11)
    results = []
    for closed_form in (True, False):
        given = hidden.clone().requires_grad_()
        log_probs, entropies = chosen_scores(HeadLogits(model), given, chosen, 0.7, closed_form)
        (log_probs * weights).sum().backward()
        results.append((log_probs.detach(), entropies.detach(), given.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
