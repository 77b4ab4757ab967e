"""The engine says what transformers and PEFT say: same tokens, log-probabilities within 1e-4.

Base and adapters, alone and mixed, for every architecture, any chunk of the prompt a step. The
truth is `model.generate` and a plain forward pass of an untouched copy of the model.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import ARCHS, EOS_ID, VOCAB_SIZE, random_adapter, tiny_model, tiny_tokenizer

from serve.engine.base import AdapterRef, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

TOLERANCE = 1e-4
MIB = 2**20
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def engine_for(arch: str, **config: int) -> LocalEngine:
    limits = EngineConfig(**{"kv_budget_bytes": MIB, **config})
    return LocalEngine(tiny_model(arch), tiny_tokenizer(), limits)


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, longest)))
        for _ in range(count)
    ]


def greedy(
    index: int, prompt: Sequence[int], adapter: Path | None = None, num_tokens: int = 16
) -> GenerationRequest:
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    ref = None if adapter is None else AdapterRef(str(adapter), str(adapter))
    return GenerationRequest(f"r{index}", tuple(prompt), params, ref, account=f"a{index % 3}")


@torch.no_grad()
def truth(
    arch: str, adapter: Path | None, prompt: Sequence[int], num_tokens: int = 16
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the log-probabilities [length, V] of a pass over prompt and completion."""
    model = reference(arch, adapter)
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=EOS_ID,
        eos_token_id=VOCAB_SIZE + 5,  # nothing ends it
    )
    logits = model(input_ids=made, attention_mask=torch.ones_like(made)).logits[0]
    return made[0, len(prompt) :].tolist(), torch.log_softmax(logits.float(), -1)


@functools.cache
def reference(arch: str, adapter: Path | None) -> torch.nn.Module:
    model = tiny_model(arch)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


def assert_equal(arch: str, engine: LocalEngine, requests: list[GenerationRequest]) -> None:
    for request, got in zip(requests, engine.generate(requests), strict=True):
        adapter = None if request.adapter is None else Path(request.adapter.path)
        prompt = request.prompt_ids
        tokens, logprobs = truth(arch, adapter, prompt, request.params.max_tokens)
        assert list(got.token_ids) == tokens, request.id
        assert got.finish_reason == "length"
        assert got.prompt_logprobs is not None
        assert got.prompt_logprobs[0] is None
        assert len(got.prompt_logprobs) == len(prompt)
        told = [*got.prompt_logprobs[1:], *got.logprobs]
        sequence = [*prompt, *tokens]
        for place, entry in enumerate(told):
            assert entry is not None
            assert entry.token_id == sequence[place + 1]
            expected = logprobs[place]
            assert abs(entry.logprob - expected[entry.token_id].item()) < TOLERANCE
            values, _ = expected.topk(len(entry.top))
            assert torch.allclose(torch.tensor([v for _, v in entry.top]), values, atol=TOLERANCE)
            for token, value in entry.top:
                assert abs(value - expected[token].item()) < TOLERANCE
        for entry in got.logprobs:  # greedy: the chosen one is the top one, bit for bit
            assert entry.top[0] == (entry.token_id, entry.logprob)


@pytest.mark.parametrize("arch", ARCHS)
def test_base_and_adapters_mixed(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    adapters = [None, *(random_adapter(model, tmp_path / str(n), 2 + n, seed=n) for n in range(3))]
    requests = [greedy(n, prompt, adapters[n % 4]) for n, prompt in enumerate(prompts(10))]
    with engine_for(arch, max_batch=6, prefill_chunk=13) as engine:
        assert_equal(arch, engine, requests)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_prefill_chunk(arch: str, chunk: int) -> None:
    requests = [greedy(n, prompt, num_tokens=6) for n, prompt in enumerate(prompts(4, seed=chunk))]
    with engine_for(arch, max_batch=3, prefill_chunk=chunk) as engine:
        assert_equal(arch, engine, requests)


def test_alone_and_in_any_order(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), tmp_path / "a")
    requests = [greedy(n, p, adapter if n % 2 else None) for n, p in enumerate(prompts(6))]
    with engine_for("llama") as engine:
        for request in requests:
            assert_equal("llama", engine, [request])
        assert_equal("llama", engine, requests[::-1])


def test_long_and_short_blocks_together() -> None:
    long = [prompt * 6 for prompt in prompts(3, longest=70, seed=3)]
    requests = [greedy(n, p[:400]) for n, p in enumerate([*long, *prompts(7, seed=4)])]
    with engine_for("llama", max_batch=10, prefill_chunk=50) as engine:
        assert_equal("llama", engine, requests)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", ["q_proj", "lm_head"]),
        ("llama", ["embed_tokens", "v_proj"]),
        ("gemma3", ["embed_tokens", "lm_head", "down_proj"]),
        ("gpt2", ["c_attn", "wte", "lm_head"]),
        ("qwen3", ["o_proj"]),
    ],
)
def test_target_modules(arch: str, targets: list[str], tmp_path: Path) -> None:
    model = tiny_model(arch)
    adapters = [
        None,
        random_adapter(model, tmp_path / "a", targets=targets, seed=1),
        random_adapter(model, tmp_path / "b", seed=2),
    ]
    requests = [greedy(n, p, adapters[n % 3], 8) for n, p in enumerate(prompts(6, 30))]
    with engine_for(arch, prefill_chunk=16) as engine:
        assert_equal(arch, engine, requests)


def test_patterns_and_scalings(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapters = [
        random_adapter(model, tmp_path / "a", r=8, use_rslora=True, lora_alpha=4, std=0.2),
        random_adapter(
            model,
            tmp_path / "b",
            r=3,
            rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.up_proj": 1},
            alpha_pattern={"q_proj": 24, "down_proj": 1},
        ),
        random_adapter(model, tmp_path / "c", r=16, targets=["up_proj"], lora_alpha=5),
    ]
    requests = [greedy(n, p, adapters[n % 3], 8) for n, p in enumerate(prompts(6, 30))]
    with engine_for("llama", prefill_chunk=16) as engine:
        assert_equal("llama", engine, requests)


def test_more_adapters_than_rows_and_places(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapters = [random_adapter(model, tmp_path / str(n), r=4, seed=n) for n in range(6)]
    requests = [greedy(n, p, adapters[n % 6], 6) for n, p in enumerate(prompts(18, 20))]
    with engine_for("llama", max_lora_rows=10, max_adapters_per_account=2) as engine:
        assert_equal("llama", engine, requests)
        stats = engine.stats()
    assert stats["adapters_in_memory"] == 2
    assert stats["adapter_evictions_total"] > 0


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.bfloat16, 0.2),
        pytest.param("cuda", torch.float32, 1e-3, marks=NEEDS_GPU),
        pytest.param("cuda", torch.bfloat16, 0.2, marks=NEEDS_GPU),
    ],
)
def test_other_devices_and_precisions(
    device: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """Log-probabilities of the engine's own choice stay near those of float32."""
    adapter = random_adapter(tiny_model("llama"), tmp_path / "a", std=0.1)
    model = tiny_model("llama").to(device, dtype)
    requests = [greedy(n, p, adapter if n % 2 else None) for n, p in enumerate(prompts(6))]
    with LocalEngine(model, tiny_tokenizer(), EngineConfig(kv_budget_bytes=MIB)) as engine:
        for request, got in zip(requests, engine.generate(requests), strict=True):
            exact = reference("llama", adapter if request.adapter else None)
            ids = torch.tensor([[*request.prompt_ids, *got.token_ids]])
            expected = torch.log_softmax(exact(input_ids=ids).logits[0], -1)
            for place, entry in enumerate(got.logprobs, len(request.prompt_ids) - 1):
                assert abs(entry.logprob - expected[place, entry.token_id].item()) < tolerance


def test_model_is_given_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    adapter = random_adapter(model, tmp_path / "a")
    with LocalEngine(model, tiny_tokenizer(), EngineConfig(kv_budget_bytes=MIB)) as engine:
        engine.generate([greedy(0, (5, 6, 7), adapter)])
    assert torch.equal(model(ids).logits, before)
