"""Written-out layers against transformers' and PEFT's own modules under autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model

from train import fused_layers, native_code, native_layers
from train.fused_layers import fuse_layers

ARCHS = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.randint(5, 200, (3, 17), generator=torch.Generator().manual_seed(0))


def pair(arch: str, **lora: Any) -> tuple[PeftModel, PeftModel]:
    """Return PEFT's model, and the same with its layers written out."""
    values = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **lora}
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(arch), LoraConfig(init_lora_weights=False, **values))
    fused = copy.deepcopy(model)
    layers = model.get_base_model().config.num_hidden_layers
    assert fuse_layers(fused.get_base_model()) == layers
    return model.train(), fused.train()


def run(model: PeftModel, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the last hidden states and every gradient of a loss that weighs each number anew."""
    trunk = model.get_base_model().base_model
    hidden = trunk(input_ids=IDS, use_cache=False, **kwargs).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return hidden.detach(), found


def assert_same(model: PeftModel, fused: PeftModel, **kwargs: Any) -> None:
    hidden, gradients = run(model, **kwargs)
    other, others = run(fused, **kwargs)
    torch.testing.assert_close(other, hidden, atol=1e-4, rtol=1e-4)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        bound = 1e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(others[name], gradient, atol=bound, rtol=1e-4, msg=name)


@pytest.fixture(params=["PyTorch", "C"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the layers that were computed as written out, in PyTorch or in C."""
    calls: list[int] = []
    place, name = (fused_layers, "_layer")
    if request.param == "C":
        if native_code.library() is None:
            pytest.skip("needs a C compiler")
        place, name = native_layers, "compute"
    else:
        monkeypatch.setattr(native_layers, "suits", lambda *_: False)
    plain = getattr(place, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(place, name, counting)
    return calls


@pytest.mark.parametrize("arch", ARCHS)
def test_hidden_states_and_gradients(arch: str, counted: list[int]) -> None:
    assert_same(*pair(arch))
    in_c = native_layers.compute.__name__ == "counting"
    assert counted or (arch == "qwen3" and in_c)  # a norm of each head is not written in C


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["gate_proj"]},
        {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
    ],
)
def test_shapes_of_adapters(lora: dict[str, Any], counted: list[int]) -> None:
    assert_same(*pair("llama", **lora))
    assert counted


def test_padded_rows_under_a_mask(counted: list[int]) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 9:] = 0
    model, fused = pair("qwen2")
    trunks = [m.get_base_model().base_model for m in (model, fused)]
    with torch.no_grad():
        hidden, other = (t(IDS, attention_mask=mask).last_hidden_state for t in trunks)
    torch.testing.assert_close(other[mask.bool()], hidden[mask.bool()], atol=1e-4, rtol=1e-4)


def test_activations_computed_again(counted: list[int]) -> None:
    model, fused = pair("llama")
    expected = run(model)
    for one in (model, fused):
        one.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        one.get_base_model().enable_input_require_grads()
    assert_same(model, fused)
    hidden, gradients = run(fused)
    torch.testing.assert_close(hidden, expected[0], atol=1e-4, rtol=1e-4)
    assert gradients.keys() == expected[1].keys()
    assert len(counted) == 2 * 2 * 2  # two runs of two layers, each computed again


def test_the_active_adapter_computes() -> None:
    model, fused = pair("llama")
    for one in (model, fused):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        one.add_adapter("second", config)
        one.set_adapter("second")
    assert_same(model, fused)
    with model.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        a, b = (m.get_base_model().base_model(IDS).last_hidden_state for m in (model, fused))
    torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_dropout": 0.5},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    ],
)
def test_what_is_not_written_out_is_done_by_peft(lora: dict[str, Any], counted: list[int]) -> None:
    model, fused = pair("qwen2", **lora)
    torch.manual_seed(5)
    hidden, gradients = run(model)
    torch.manual_seed(5)
    other, others = run(fused)
    assert torch.equal(hidden, other)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert not counted


def test_generation_uses_its_cache() -> None:
    model, fused = pair("llama")
    found = [m.eval().generate(IDS[:1], max_new_tokens=8, do_sample=False) for m in (model, fused)]
    assert torch.equal(*found)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_other_architectures_stay_as_they_are(arch: str) -> None:
    assert fuse_layers(tiny_model(arch)) == 0


def test_bfloat16_base_with_float32_adapters(counted: list[int]) -> None:
    model, fused = pair("llama")
    for one in (model, fused):
        for name, parameter in one.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    hidden, gradients = run(model)
    other, others = run(fused)
    assert other.dtype == torch.bfloat16
    scale = hidden.float().abs().max().item()
    assert (other - hidden).float().abs().max() < 0.05 * scale
    for name, gradient in gradients.items():
        assert others[name].dtype == torch.float32
        similar = torch.cosine_similarity(others[name].flatten(), gradient.flatten(), dim=0)
        assert similar > 0.98, name
