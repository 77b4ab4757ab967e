"""Decoder layers in C against transformers' and PEFT's own modules under autograd in float64."""

from __future__ import annotations

import copy
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from serve.engine import kernels, machine_code
from train import native_code, native_layers
from train.fused_layers import fuse_layers
from train.memory import is_out_of_memory
from train.native_code import BY_FLOAT, BY_PAIRS, BY_UNIT

pytestmark = pytest.mark.skipif(native_code.library() is None, reason="needs a C compiler")

# hidden, heads, key heads, a head, the MLP: whole vectors; and nothing that is a multiple of 16
SHAPES = {
    "even": (64, 4, 2, 16, 96),
    "odd": (42, 6, 3, 10, 70),
    "alone": (32, 1, 1, 32, 33),
    "wide": (512, 4, 2, 128, 1024),
}
NAMES = {BY_FLOAT: "float", BY_PAIRS: "pairs", BY_UNIT: "unit"}


def model_of(shape: str, rank: int = 4, kind: str = "llama", **lora: Any) -> PeftModel:
    """Return two layers with adapters, in float64."""
    hidden, heads, key_heads, width, inner = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": 64, "hidden_size": hidden, "num_hidden_layers": 2},
        **{"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width},
        **{"intermediate_size": inner, "max_position_embeddings": 512},
        **({"attention_bias": True} if kind == "llama" else {"sliding_window": 5}),
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    values = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **lora}
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **values)).train()


def converted(model: PeftModel, dtype: torch.dtype) -> PeftModel:
    """Return the base in `dtype`, its adapters in float32."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
    return other


def fused(model: PeftModel, dtype: torch.dtype = torch.float32) -> PeftModel:
    other = converted(model, dtype)
    fuse_layers(other.get_base_model())
    return other


def run(model: PeftModel, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return hidden states, and the gradients of a weighted sum of those that are not padding."""
    trunk = model.get_base_model().base_model
    embedded = trunk.embed_tokens(ids).detach().requires_grad_()
    out = trunk(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    real = torch.ones_like(ids) if mask is None else mask
    hidden = out * real[..., None]
    (hidden * weights).sum().backward()
    assert embedded.grad is not None
    found = {"hidden": hidden.detach(), "input": embedded.grad * real[..., None]}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        off = (found[name].double() - truth).abs().max() / (truth.abs().max() + 1e-2)
        assert off < bound, f"{name}: {off:.2g}"


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the layers that C computes; each test here needs some."""
    calls: list[int] = []
    plain = native_layers.compute

    def counting(*args: Any) -> Tensor:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(native_layers, "compute", counting)
    return calls


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "rows", "length"), [(4, 3, 17), (20, 1, 1), (5, 2, 131)])
def test_outputs_and_gradients(
    shape: str, rank: int, rows: int, length: int, computed: list[int]
) -> None:
    model = model_of(shape, rank)
    ids = ids_of(rows, length)
    assert_close(run(fused(model), ids), run(model, ids), 2e-5)
    assert len(computed) == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [9, 90])
def test_padded_rows(side: str, length: int, computed: list[int]) -> None:
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, : length // 2] = mask[2, :3] = 0
    mask = mask.flip(1) if side == "right" else mask
    model = model_of("even")
    assert_close(
        run(fused(model), ids_of(3, length), mask), run(model, ids_of(3, length), mask), 2e-5
    )
    assert computed


def test_a_window_comes_as_a_mask(computed: list[int]) -> None:
    model = model_of("even", kind="mistral")
    assert_close(run(fused(model), ids_of(2, 80)), run(model, ids_of(2, 80)), 2e-5)
    assert computed


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": ["gate_proj", "down_proj"], "rank_pattern": {"down_proj": 33}},
        {"layers_to_transform": [1]},
    ],
)
def test_some_projections_have_adapters(lora: dict[str, Any], computed: list[int]) -> None:
    model = model_of("odd", **{"target_modules": ["q_proj", "o_proj", "down_proj"], **lora})
    assert_close(run(fused(model), ids_of(2, 11)), run(model, ids_of(2, 11)), 2e-5)
    assert len(computed) == 2


def test_some_matrices_of_an_adapter_are_frozen(computed: list[int]) -> None:
    model = model_of("even")
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name or "gate_proj.lora_B" in name or "o_proj.lora" in name:
            parameter.requires_grad_(False)
    assert_close(run(fused(model), ids_of(2, 11)), run(model, ids_of(2, 11)), 2e-5)
    assert computed


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["v_proj", "gate_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 70, "k_proj": 9}},
    ],
)
@pytest.mark.parametrize("way", [BY_FLOAT, BY_PAIRS, BY_UNIT], ids=NAMES.get)
def test_some_projections_in_bfloat16(
    lora: dict[str, Any], way: int, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    """Gate and up are multiplied together, whatever adapters they have."""
    if way not in ways():
        pytest.skip("this processor has no such products")
    monkeypatch.setattr(native_code, "_way_in_bfloat16", lambda: way)
    rounded = converted(model_of("even", **lora), torch.bfloat16)
    truth = run(converted(rounded, torch.float64).double(), ids_of(3, 40))
    found = run(fused(rounded, torch.bfloat16), ids_of(3, 40))
    assert computed
    for name, expected in truth.items():
        off = ((found[name].double() - expected).norm() / expected.norm()).item()
        assert off < 0.06, f"{name}: {off:.2g}"


def ways() -> list[int]:
    able = [BY_FLOAT]
    if kernels.library() is not None and kernels.library().multiplies_bfloat16():
        able.append(BY_PAIRS)
    if native_code.library() is not None and native_code.library().has_unit():
        able.append(BY_UNIT)
    return able


@pytest.mark.parametrize("way", [BY_FLOAT, BY_PAIRS, BY_UNIT], ids=NAMES.get)
@pytest.mark.parametrize(
    ("shape", "length"), [("even", 40), ("odd", 17), ("alone", 70), ("wide", 9)]
)
def test_a_base_in_bfloat16(
    way: int, shape: str, length: int, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    """About as near to float64 as transformers' own modules in bfloat16 are."""
    if way not in ways():
        pytest.skip("this processor has no such products")
    monkeypatch.setattr(native_code, "_way_in_bfloat16", lambda: way)
    model = model_of(shape)
    rounded = converted(model, torch.bfloat16)
    ids = ids_of(3, length)
    truth = run(converted(rounded, torch.float64).double(), ids)
    found, usual = run(fused(rounded, torch.bfloat16), ids), run(rounded, ids)
    assert computed
    for name, expected in truth.items():
        assert found[name].dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        off, usually = (
            ((part[name].double() - expected).norm() / expected.norm()).item()
            for part in (found, usual)
        )
        # PEFT keeps adapters in float32, here they are rounded as the base is
        assert off < 2 * usually + 0.02, f"{name}: {off:.2g}, usually {usually:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_batch_mates_change_no_bit(dtype: torch.dtype) -> None:
    model = fused(model_of("odd"), dtype)
    ids = ids_of(5, 33)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(model, ids))
    finally:
        torch.set_num_threads(before)
    one, three = results
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert torch.equal(run(model, ids[1:3])["hidden"], one["hidden"][1:3])


def test_without_gradients_the_same() -> None:
    model = fused(model_of("even"))
    expected = run(model, ids_of(2, 9))["hidden"]
    with torch.no_grad():
        trunk = model.get_base_model().base_model
        assert torch.equal(trunk(ids_of(2, 9), use_cache=False).last_hidden_state, expected)


def test_not_a_number_is_not_hidden() -> None:
    model = fused(model_of("even"))
    with torch.no_grad():
        model.get_base_model().base_model.embed_tokens.weight[7] = float("nan")
    ids = ids_of(2, 9) % 7
    ids[1, 4] = 7
    hidden = run(model, ids)["hidden"]
    assert not hidden[0].isnan().any()
    assert hidden[1, 4:].isnan().all()


def test_hidden_keys_count_for_nothing(computed: list[int]) -> None:
    """Not for a little either: what stands behind a mask changes no bit before it."""
    model = fused(model_of("even"))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    ids = ids_of(2, 12) % 60
    expected = run(model, ids, mask)["hidden"]
    with torch.no_grad():
        model.get_base_model().base_model.embed_tokens.weight[63] *= 1e4
    ids[0, :4] = 63
    assert torch.equal(run(model, ids, mask)["hidden"], expected)
    assert computed


def test_memory_that_is_refused_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 1

    model = fused(model_of("even"))
    monkeypatch.setattr(native_code, "library", Full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(model, ids_of(2, 10))
    assert is_out_of_memory(caught.value)
    assert computed


def test_what_it_does_not_suit(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused(model_of("even"))
    monkeypatch.setattr(native_layers, "LONGEST", 10)
    expected = run(model, ids_of(2, 10))
    assert computed
    computed.clear()
    run(model, ids_of(2, 11))
    monkeypatch.setattr(native_code, "library", lambda: None)
    assert_close(run(model, ids_of(2, 10)), {k: v.double() for k, v in expected.items()}, 2e-5)
    assert not computed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize(
    "processor", ["x86-64", "x86-64-v3", "icelake-server", "cooperlake", "sapphirerapids"]
)
def test_the_source_is_whole_for_other_processors(tmp_path: Path, processor: str) -> None:
    compiler = machine_code.find_compiler()
    assert compiler
    flags = [flag.replace("native", processor) for flag in machine_code.FLAGS if flag != "-O3"]
    headers = f"-I{kernels.SOURCE.parent}"
    command = [compiler, "-O1", *flags, headers, "-Wl,--no-undefined", str(native_code.SOURCE)]
    subprocess.run([*command, "-lm", "-o", str(tmp_path / "training.so")], check=True)
