"""The compiled kernels against torch in double precision, at every odd size."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_exact import assert_equal, engine_for, greedy, prompts
from tiny_models import random_adapter, tiny_model, tiny_tokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from serve.engine import kernels
from serve.engine.kernels import BF16, F32, Q8, AdapterPlan, Packed, Product
from serve.engine.local import EngineConfig, LocalEngine
from serve.engine.norms import Norms

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="needs a C compiler")


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Round as GGUF's Q8_0 does: signed integers by a half-precision scale."""
    blocks = weight.view(len(weight), -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return ((blocks / scale).round().clamp(-127, 127) * scale).view_as(weight)


def q4_1(weight: torch.Tensor) -> torch.Tensor:
    """Round as GGUF's Q4_1 does: 0 to 15 by a half-precision scale, plus the lowest."""
    blocks = weight.view(len(weight), -1, 32)
    lowest, highest = blocks.aminmax(dim=-1, keepdim=True)
    lowest, scale = lowest.half().float(), ((highest - lowest) / 15).half().float()
    return (((blocks - lowest) / scale).round().clamp(0, 15) * scale + lowest).view_as(weight)


FORMATS = {
    "float32": (lambda weight: weight, F32),
    "bfloat16": (lambda weight: weight.bfloat16().float(), BF16),
    "q8_0": (q8_0, Q8),
    "q4_1": (q4_1, Q8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name: str) -> None:
    rounded, expected = FORMATS[name]
    torch.manual_seed(0)
    for rows in (1, 16, 33):
        weight = rounded(torch.randn(rows, 96))
        packed = Packed(weight)
        assert packed.format == expected
        assert torch.equal(packed.dense(), weight)


def test_zeros_and_odd_weights_are_packed() -> None:
    for weight in (torch.zeros(20, 64), torch.full((20, 64), 0.1), torch.randn(5, 33)):
        assert torch.equal(Packed(weight).dense(), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_any_size(name: str) -> None:
    rounded, _ = FORMATS[name]
    torch.manual_seed(1)
    heights = (1, 2, 4, 5, 8, 9, 15, 16, 17, 20, 32, 47)
    for height, (outputs, inputs) in itertools.product(heights, ((1, 32), (40, 96), (130, 64))):
        weight, x = rounded(torch.randn(outputs, inputs)), torch.randn(height, inputs)
        for bias in (None, torch.randn(outputs)):
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), None if bias is None else bias.double()
            )
            got = Product(weight, bias)(x, None)
            assert got.shape == expected.shape
            assert torch.allclose(got.double(), expected, atol=1e-4), (height, outputs)


def test_inputs_that_no_block_divides() -> None:
    torch.manual_seed(2)
    for inputs in (1, 7, 33, 100):
        weight, x = torch.randn(19, inputs), torch.randn(6, inputs)
        assert torch.allclose(Product(weight, None)(x, None), x @ weight.T, atol=1e-4)


def test_every_token_gets_its_own_adapter_and_no_other() -> None:
    torch.manual_seed(3)
    sizes, inputs, num_rows = (24, 5), 40, 12
    weight = torch.randn(sum(sizes), inputs)
    a = torch.randn(num_rows, len(sizes), inputs)
    b = [torch.randn(num_rows, size) for size in sizes]
    owned = {0: [], 1: [0, 1, 2], 2: [3, 7, 5, 11]}
    b[0][9] = torch.nan  # nobody's
    tokens = [2, 0, 1, 1, 2, 0, 2]
    x = torch.randn(len(tokens), inputs)
    product = Product(weight, None)
    product.struct.a, product.struct.siblings = a.data_ptr(), len(sizes)
    for index, size in enumerate(sizes):
        product.struct.b[index], product.struct.size[index] = b[index].data_ptr(), size
    starts = {0: 0, 1: 0, 2: 3}
    plan = AdapterPlan(
        [starts[t] for t in tokens], [len(owned[t]) for t in tokens], owned[1] + owned[2]
    )
    got = product(x, plan)
    for n, token in enumerate(tokens):
        expected = weight @ x[n]
        start = 0
        for index, size in enumerate(sizes):
            for row in owned[token]:
                expected[start : start + size] += (a[row, index] @ x[n]) * b[index][row]
            start += size
        assert torch.allclose(got[n], expected, atol=1e-4)


def test_without_a_compiler_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    adapters = [None, *(random_adapter(tiny_model("llama"), tmp_path / str(n), 3) for n in "ab")]
    asked = [greedy(n, prompt, adapters[n % 3]) for n, prompt in enumerate(prompts(8))]
    with engine_for("llama", max_batch=4, prefill_chunk=40) as engine:
        assert_equal("llama", engine, asked)


def test_the_model_is_given_back_as_it_was() -> None:
    model = tiny_model("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with LocalEngine(model, tiny_tokenizer(), EngineConfig(kv_budget_bytes=2**20)):
        pass
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_attention_over_windows_of_the_arena() -> None:
    torch.manual_seed(4)
    heads, kv_heads, width, value_width = 6, 2, 24, 20
    keys, values = torch.randn(300, kv_heads, width), torch.randn(300, kv_heads, value_width)
    first, length = torch.tensor([0, 70, 200, 13]), torch.tensor([1, 33, 100, 16])
    query = torch.randn(4, heads, width)
    for softcap in (None, 2.0):
        got = kernels.attend(query, keys, values, first, length, 0.3, softcap, 2)
        for n in range(4):
            seen = slice(int(first[n]), int(first[n] + length[n]))
            for head in range(heads):
                own = head // (heads // kv_heads)
                scores = keys[seen, own].double() @ query[n, head].double() * 0.3
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                expected = scores.softmax(0) @ values[seen, own].double()
                assert torch.allclose(got[n, head].double(), expected, atol=1e-5)


def test_attention_tells_what_is_not_finite() -> None:
    keys, values = torch.randn(40, 1, 8), torch.randn(40, 1, 8)
    keys[25] = torch.nan
    first, length = torch.tensor([0, 0]), torch.tensor([20, 40])
    got = kernels.attend(torch.randn(2, 1, 8), keys, values, first, length, 1.0, None, 2)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(3, 4, 50), torch.randn(50)
    expected = torch.nn.functional.rms_norm(x.double(), (50,), (weight + offset).double(), 1e-5)
    assert torch.allclose(kernels.rms_norm(weight, offset, 1e-5)(x).double(), expected, atol=1e-5)


def test_the_norms_of_real_models_are_replaced() -> None:
    for arch in ("llama", "gemma3", "qwen3"):
        model = tiny_model(arch)
        norms = Norms(model)
        names = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
        wanted = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        assert len(names) == len(wanted) > 0
        norms.close()
        assert not any("forward" in vars(m) for m in model.modules())


def test_rotary_angles_are_those_of_transformers() -> None:
    torch.manual_seed(6)
    rows, heads, width = 5, 3, 24
    x = torch.randn(rows, heads * width + 10)
    angles = torch.randn(rows, width // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    query = x[:, : heads * width].view(1, rows, heads, width).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(query, query, cosine[None], sine[None])
    got = x.clone()
    kernels.rotate(got, heads, cosine, sine)
    turned = got[:, : heads * width].view(1, rows, heads, width).transpose(1, 2)
    assert torch.allclose(turned, expected, atol=1e-6)
    assert torch.equal(got[:, heads * width :], x[:, heads * width :])


def test_gating() -> None:
    torch.manual_seed(7)
    for rows, width in ((1, 5), (3, 48), (40, 3000)):
        both = torch.randn(rows, 2 * width) * 30
        first, second = both.double().split(width, dim=1)
        expected = torch.nn.functional.silu(first) * second
        assert torch.allclose(kernels.gate(both, 2).double(), expected, rtol=1e-5, atol=1e-30)
    odd = torch.tensor([[torch.nan] * 16 + [-1e30] * 16 + [1.0] * 32])
    got = kernels.gate(odd, 1)[0]
    assert got[:16].isnan().all()
    assert (got[16:].abs() < 1e-6).all()


@pytest.mark.parametrize(
    ("arch", "count"),
    [("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 0), ("gemma3", 0), ("gpt2", 0)],
)
def test_only_layers_of_the_llama_family_are_replaced(arch: str, count: int) -> None:
    with engine_for(arch) as engine:
        assert len(engine._runner._layers) == count


def test_layers_that_compute_something_else_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose residual is scaled looks like Llama, but is not: its logits tell."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])
    plain = kind.forward

    def scaled(self: torch.nn.Module, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return plain(self, hidden_states * 0.5, **others)

    monkeypatch.setattr(kind, "forward", scaled)
    with LocalEngine(model, tiny_tokenizer(), EngineConfig(kv_budget_bytes=2**20)) as engine:
        assert len(engine._runner._layers) == 0


def test_threads_may_call_at_the_same_time() -> None:
    torch.manual_seed(8)
    weights = [torch.randn(300, 256) for _ in range(4)]
    inputs = [torch.randn(20, 256) for _ in range(4)]
    products = [Product(weight, None) for weight in weights]

    def right(n: int) -> bool:
        got = products[n % 4](inputs[n % 4], None)
        return torch.allclose(got, inputs[n % 4] @ weights[n % 4].T, atol=1e-3)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(400)))
