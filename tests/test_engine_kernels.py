"""The compiled kernels against torch in double precision, at every odd size."""

from __future__ import annotations

import itertools
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_exact import assert_equal, engine_for, greedy, prompts
from tiny_models import VOCAB_SIZE, random_adapter, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.errors import InvalidInput
from serve.engine import kernels, machine_code
from serve.engine.base import GenerationRequest, SamplingParams
from serve.engine.kernels import (
    BF16,
    F32,
    PAIRS,
    PAIRS_Q8,
    Q8,
    Q8_OFFSET,
    AdapterPlan,
    Packed,
    Product,
)
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
    "q4_1": (q4_1, Q8_OFFSET),
}
NEEDS_BFLOAT16 = pytest.mark.skipif(
    not kernels.multiply_bfloat16(), reason="needs a processor that multiplies bfloat16"
)
NEEDS_8BIT = pytest.mark.skipif(
    not kernels.multiply_8bit(), reason="needs a processor that multiplies 8-bit integers"
)


@pytest.fixture
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 in whatever time they take here."""
    if not (kernels.library() and kernels.library().multiplies_bfloat16()):
        pytest.skip("needs a processor that multiplies bfloat16")
    monkeypatch.setattr(kernels, "fast_in_bfloat16", lambda: True)


def whole_numbers(x: torch.Tensor) -> torch.Tensor:
    """Round rows to 16-bit integers by a factor for each 32 inputs."""
    blocks = x.double().view(len(x), -1, 32)
    factor = blocks.abs().amax(-1, keepdim=True) / 32767
    return torch.where(factor > 0, (blocks / factor).round() * factor, 0).view_as(x)


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name: str) -> None:
    rounded, expected = FORMATS[name]
    torch.manual_seed(0)
    for rows in (1, 16, 33):
        weight = rounded(torch.randn(rows, 96))
        packed = Packed(weight)
        assert packed.format == expected
        assert torch.equal(packed.dense(), weight)


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("name", FORMATS)
def test_packing_in_pairs_loses_nothing_but_float32(name: str) -> None:
    rounded, expected = FORMATS[name]
    torch.manual_seed(0)
    for rows, inputs in ((1, 32), (16, 96), (33, 64)):
        weight = rounded(torch.randn(rows, inputs))
        packed = Packed(weight, in_bfloat16=True)
        assert packed.format == PAIRS + max(expected - BF16, 0)  # float32 becomes bfloat16
        assert packed.is_exact == (name != "float32")
        kept = weight if packed.is_exact else weight.bfloat16().float()
        assert torch.equal(packed.dense(), kept)


@NEEDS_8BIT
@pytest.mark.parametrize("name", FORMATS)
def test_only_8bit_weights_lie_in_pairs_where_bfloat16_is_slow(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "fast_in_bfloat16", lambda: False)
    rounded, expected = FORMATS[name]
    torch.manual_seed(0)
    weight = rounded(torch.randn(33, 64))
    packed = Packed(weight, in_bfloat16=True)
    is_8bit = expected in (Q8, Q8_OFFSET)
    assert packed.format == (PAIRS_Q8 - Q8 + expected if is_8bit else BF16)
    assert torch.equal(packed.dense(), weight if name != "float32" else weight.bfloat16().float())


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


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("name", FORMATS)
def test_products_in_bfloat16_round_both_sides_and_sum_in_float32(name: str) -> None:
    rounded, kind = FORMATS[name]
    whole = kind in (Q8, Q8_OFFSET) and multiplied_whole()
    torch.manual_seed(1)
    for height, (outputs, inputs) in itertools.product(
        (1, 3, 8, 16, 20, 47), ((1, 32), (40, 96), (130, 320), (70, 1184))
    ):
        weight, x = rounded(torch.randn(outputs, inputs)), torch.randn(height, inputs)
        bias = torch.randn(outputs)
        if whole:
            sides = whole_numbers(x), weight.double()
        else:
            sides = x.bfloat16().double(), weight.bfloat16().double()
        expected = torch.nn.functional.linear(*sides, bias.double())
        got = Product(weight, bias, in_bfloat16=True)(x, None)
        # A tie may be rounded to the other of two 16-bit integers, which are 1e-4 apart.
        close = 1e-3 if whole else 1e-4
        assert torch.allclose(got.double(), expected, atol=close), (height, outputs)


def multiplied_whole() -> bool:
    """Tell whether 8-bit weights are multiplied as such: not where there is a matrix unit."""
    return kernels.multiply_8bit() and not torch.cpu.get_capabilities().get("amx_bf16")


NEEDS_WHOLE = pytest.mark.skipif(
    not multiplied_whole(), reason="needs AVX512-VNNI, and no matrix unit"
)


@NEEDS_WHOLE
@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_whole_numbers_are_near_float32_and_do_not_depend_on_other_rows(name: str) -> None:
    rounded, _ = FORMATS[name]
    torch.manual_seed(6)
    weight, x = rounded(torch.randn(130, 640)), torch.randn(47, 640)
    x[:, 7] *= 300  # one input that is far larger spoils its own block only
    product = Product(weight, None, in_bfloat16=True)
    got = product(x, None)
    exact = x.double() @ weight.double().T
    scale = (x.double().abs() @ weight.double().abs().T).mean()
    assert (got.double() - exact).abs().max() < 2e-4 * scale
    assert (x.bfloat16().double() @ weight.bfloat16().double().T - exact).abs().max() > 2e-4 * scale
    for height in (1, 2, 5, 8, 16, 17, 31):
        assert torch.equal(product(x[:height], None), got[:height])


@NEEDS_WHOLE
def test_whole_numbers_of_rows_that_are_zero_tiny_or_not_finite() -> None:
    weight = q8_0(torch.randn(40, 96))
    x = torch.zeros(6, 96)
    x[1, 40], x[2, 50], x[3] = torch.nan, -torch.inf, 1e-38
    x[4] = torch.randn(96)
    got = Product(weight, None, in_bfloat16=True)(x, None)
    assert torch.equal(got[0], torch.zeros(40))
    assert not got[1].isfinite().any()
    assert not got[2].isfinite().any()
    assert got[3].abs().max() < 1e-35
    assert torch.allclose(got[4].double(), whole_numbers(x)[4] @ weight.double().T, atol=1e-4)


@pytest.mark.usefixtures("in_pairs")
def test_odd_numbers_of_inputs_in_bfloat16() -> None:
    torch.manual_seed(2)
    for inputs in (1, 7, 33, 101):
        weight, x = torch.randn(19, inputs), torch.randn(6, inputs)
        expected = x.bfloat16().double() @ weight.bfloat16().double().T
        got = Product(weight, None, in_bfloat16=True)(x, None)
        assert torch.allclose(got.double(), expected, atol=1e-4)


def test_inputs_that_no_block_divides() -> None:
    torch.manual_seed(2)
    for inputs in (1, 7, 33, 100):
        weight, x = torch.randn(19, inputs), torch.randn(6, inputs)
        assert torch.allclose(Product(weight, None)(x, None), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize("narrow", [False, True])
def test_every_token_gets_its_own_adapter_and_no_other(narrow: bool) -> None:
    torch.manual_seed(3)
    sizes, inputs, num_rows = (24, 5), 40, 12
    weight = torch.randn(sum(sizes), inputs)
    a = torch.randn(num_rows, len(sizes), inputs)
    b = [torch.randn(num_rows, size) for size in sizes]
    owned = {0: [], 1: [0, 1, 2], 2: [3, 7, 5, 11]}
    if narrow:
        a, b = a.bfloat16(), [part.bfloat16() for part in b]
    b[0][9] = torch.nan  # nobody's
    tokens = [2, 0, 1, 1, 2, 0, 2]
    x = torch.randn(len(tokens), inputs)
    product = Product(weight, None)
    product.struct.a, product.struct.siblings = a.data_ptr(), len(sizes)
    product.struct.narrow = int(narrow)
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
                expected[start : start + size] += (a[row, index].float() @ x[n]) * b[index][
                    row
                ].float()
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
    assert torch.allclose(kernels.RmsNorm(weight, offset, 1e-5)(x).double(), expected, atol=1e-5)


def test_the_norms_of_real_models_are_replaced() -> None:
    for arch in ("llama", "gemma3", "qwen3"):
        model = tiny_model(arch)
        norms = Norms(model, has_kernels=True)
        names = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
        wanted = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        assert len(names) == len(wanted) > 0
        norms.close()
        assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("arch", "taken"),
    [
        *(("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True)),
        *(("gemma3", False), ("gpt2", False)),
    ],
)
def test_models_of_the_llama_family_are_taken_over(arch: str, taken: bool) -> None:
    with engine_for(arch) as engine:
        assert (engine._runner._native is not None) == taken


def long_window_model() -> PreTrainedModel:
    """Heads of whole vectors, three queries a key, a window that long prompts leave."""
    config = AutoConfig.for_model(
        *("mistral",),
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 80},
        **{"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
        **{"head_dim": 80, "sliding_window": 45, "max_position_embeddings": 512},
        **{"initializer_range": 0.2, "eos_token_id": 2},
    )
    torch.manual_seed(9)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("chunk", [7, 64, 256])
def test_long_prompts_with_windows_are_those_of_transformers(chunk: int) -> None:
    asked = [
        GenerationRequest(
            *(f"r{n}", prompt),
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True),
        )
        for n, prompt in enumerate(prompts(5, longest=230, seed=4))
    ]
    reference = long_window_model()
    config = EngineConfig(kv_budget_bytes=2**22, prefill_chunk=chunk, prefill_beside=chunk)
    with LocalEngine(long_window_model(), tiny_tokenizer(), config) as engine:
        assert engine._runner._native is not None
        got = engine.generate(asked)
    for request, completion in zip(asked, got, strict=True):
        ids = torch.tensor([list(request.prompt_ids)])
        with torch.no_grad():
            expected = reference(ids).logits[0].log_softmax(-1)
        assert completion.prompt_logprobs is not None
        for place, entry in enumerate(completion.prompt_logprobs[1:]):
            assert entry is not None
            assert abs(entry.logprob - expected[place, entry.token_id].item()) < 1e-4


@NEEDS_BFLOAT16
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_engines_in_bfloat16_are_near_float32_and_do_not_depend_on_batch_mates(arch: str) -> None:
    """Rounding to 8 bits moves log-probabilities by less than 0.15 here (0.05 is usual)."""
    asked = [greedy(n, prompt) for n, prompt in enumerate(prompts(6))]
    config = EngineConfig(kv_budget_bytes=2**20, prefill_chunk=64)
    reference = tiny_model(arch)
    with LocalEngine(tiny_model(arch), tiny_tokenizer(), config, in_bfloat16=True) as engine:
        together = engine.generate(asked)
        alone = [engine.generate([request])[0] for request in asked]
    assert engine.dtype == "bfloat16"
    for request, got, single in zip(asked, together, alone, strict=True):
        assert got.token_ids == single.token_ids
        assert got.prompt_logprobs is not None
        with torch.no_grad():
            expected = reference(torch.tensor([list(request.prompt_ids)])).logits[0].log_softmax(-1)
        for place, entry in enumerate(got.prompt_logprobs[1:]):
            assert entry is not None
            assert abs(entry.logprob - expected[place, entry.token_id].item()) < 0.15


@NEEDS_BFLOAT16
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_a_bfloat16_model_computes_as_the_same_numbers_in_float32(arch: str) -> None:
    asked = [greedy(n, prompt) for n, prompt in enumerate(prompts(6))]
    config = EngineConfig(kv_budget_bytes=2**20, prefill_chunk=64)
    narrow = tiny_model(arch).bfloat16()
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    wide = tiny_model(arch).bfloat16().float()
    answers = []
    for model in (narrow, wide):
        with LocalEngine(model, tiny_tokenizer(), config, in_bfloat16=True) as engine:
            assert engine._runner._native is not None
            answers.append(engine.generate(asked))
    for got, expected in zip(*answers, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        for one, other in zip(got.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            assert abs(one.logprob - other.logprob) < 1e-3
    after = narrow.state_dict()  # given back bit for bit
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert narrow(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize(
    "processor", ["x86-64", "x86-64-v3", "icelake-server", "cooperlake", "sapphirerapids"]
)
def test_the_source_is_whole_for_other_processors(tmp_path: Path, processor: str) -> None:
    """Without vectors, without AVX-512, with 8-bit, bfloat16 but no matrix unit, with all."""
    compiler = machine_code.find_compiler()
    assert compiler
    flags = [flag.replace("native", processor) for flag in machine_code.FLAGS if flag != "-O3"]
    command = [compiler, "-O1", *flags, "-Wl,--no-undefined", str(kernels.SOURCE), "-lm"]
    subprocess.run([*command, "-o", str(tmp_path / "kernels.so")], check=True)


@NEEDS_BFLOAT16
def test_chunks_of_a_prompt_that_reach_no_head_in_bfloat16() -> None:
    request = GenerationRequest(
        "1", tuple(range(1, 41)), SamplingParams(max_tokens=4, temperature=0)
    )
    answers = []
    for chunk in (8, 64):
        config = EngineConfig(kv_budget_bytes=2**20, prefill_chunk=chunk)
        with LocalEngine(tiny_model("llama"), tiny_tokenizer(), config, in_bfloat16=True) as engine:
            answers.append(engine.generate([request])[0].token_ids)
    assert answers[0] == answers[1]


@NEEDS_BFLOAT16
def test_models_that_cannot_be_widened_are_refused() -> None:
    with pytest.raises(InvalidInput, match="bfloat16"):
        LocalEngine(tiny_model("gpt2").bfloat16(), tiny_tokenizer(), in_bfloat16=True)


def test_bfloat16_is_refused_where_it_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiply_bfloat16", lambda: False)
    with pytest.raises(InvalidInput, match="AVX512-VNNI"):
        LocalEngine(tiny_model("llama"), tiny_tokenizer(), in_bfloat16=True)


def test_models_that_compute_something_else_are_not_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model whose residual is scaled looks like Llama, but is not: its logits tell."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])
    plain = kind.forward

    def scaled(self: torch.nn.Module, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return plain(self, hidden_states * 0.5, **others)

    monkeypatch.setattr(kind, "forward", scaled)
    with LocalEngine(model, tiny_tokenizer(), EngineConfig(kv_budget_bytes=2**20)) as engine:
        assert engine._runner._native is None


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
