"""Embeddings against transformers' own hidden states, in the engine and through the client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from peft import PeftModel
from tiny_models import ARCHS, random_adapter, tiny_model, tiny_tokenizer

from data.errors import InvalidInput
from serve.engine.base import AdapterRef, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

MIB = 2**20
TEXTS = ["The cat sat on the mat.", "x", "a longer text, " * 12]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("embeddings"))) as found:
        yield found


def states(arch: str, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Return the last hidden states [T, D] of transformers with PEFT."""
    model: Any = tiny_model(arch)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0]


def truth(arch: str, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    return states(arch, ids, adapter).mean(dim=0)


def unit(text: str) -> np.ndarray:
    vector = truth("llama", tiny_tokenizer().encode(text)).numpy()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_engine_gives_transformers_mean(arch: str, tmp_path: Path) -> None:
    """Beside streams, in chunks of any size, with and without an adapter."""
    adapter = random_adapter(tiny_model(arch), tmp_path / "a")
    ref = AdapterRef("a", str(adapter))
    embed = SamplingParams(max_tokens=0, embed=True)
    stream = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = [tuple(tiny_tokenizer().encode(text)) for text in TEXTS]
    requests = [GenerationRequest(f"s{n}", p, stream) for n, p in enumerate(prompts)]
    requests += [GenerationRequest(f"e{n}", p, embed) for n, p in enumerate(prompts)]
    requests += [GenerationRequest(f"a{n}", p, embed, ref) for n, p in enumerate(prompts)]
    config = EngineConfig(kv_budget_bytes=MIB, prefill_chunk=7, max_batch=6)
    with LocalEngine(tiny_model(arch), tiny_tokenizer(), config) as engine:
        found = engine.generate(requests)
        again = engine.generate(requests[3:])  # prefixes are known now, and must not be skipped
    for done, request in zip([*found[3:], *again], [*requests[3:], *requests[3:]], strict=True):
        expected = truth(arch, list(request.prompt_ids), adapter if request.adapter else None)
        assert done.embedding is not None
        assert torch.allclose(torch.tensor(done.embedding), expected, atol=1e-4)
    assert all(done.embedding is None for done in found[:3])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_state_is_transformers(arch: str, tmp_path: Path) -> None:
    """Also where the prefix cache knows all of the prompt but its last token."""
    adapter = random_adapter(tiny_model(arch), tmp_path / "a")
    ref = AdapterRef("a", str(adapter))
    last = SamplingParams(max_tokens=0, embed=True, pool="last")
    prompts = [tuple(tiny_tokenizer().encode(text)) for text in TEXTS]
    requests = [GenerationRequest(f"e{n}", p, last) for n, p in enumerate(prompts)]
    requests += [GenerationRequest(f"a{n}", p, last, ref) for n, p in enumerate(prompts)]
    config = EngineConfig(kv_budget_bytes=MIB, prefill_chunk=7, max_batch=6)
    with LocalEngine(tiny_model(arch), tiny_tokenizer(), config) as engine:
        found = [*engine.generate(requests), *engine.generate(requests)]
    assert max(done.num_cached for done in found[6:]) > 0
    for done, request in zip(found, [*requests, *requests], strict=True):
        expected = states(arch, list(request.prompt_ids), adapter if request.adapter else None)[-1]
        assert done.embedding is not None
        assert torch.allclose(torch.tensor(done.embedding), expected, atol=1e-4)


def test_an_embedding_generates_nothing() -> None:
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(max_tokens=1, embed=True)
    assert caught.value.param == "max_tokens"


def test_the_official_client_reads_base64(server: Server) -> None:
    answer = server.client().embeddings.create(model=MODEL, input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, text in zip(answer.data, TEXTS, strict=True):
        assert np.allclose(item.embedding, unit(text), atol=1e-5)
        assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-5)
    lengths = [len(tiny_tokenizer().encode(text)) for text in TEXTS]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)


def test_every_form_of_input(server: Server) -> None:
    http = server.http()
    ids = tiny_tokenizer().encode(TEXTS[0])
    forms: list[Any] = [TEXTS[0], [TEXTS[0]], ids, [ids]]
    for form in forms:
        body = {"model": MODEL, "input": form}
        [item] = http.post("/v1/embeddings", json=body).json()["data"]
        assert np.allclose(item["embedding"], unit(TEXTS[0]), atol=1e-5)
    body = {"model": MODEL, "input": ids, "encoding_format": "base64"}
    [item] = http.post(f"/v1/engines/{MODEL}/embeddings", json=body).json()["data"]
    vector = np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4")
    assert np.allclose(vector, unit(TEXTS[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input", "invalid_value"),
        ({"input": [10**6]}, "input", "invalid_value"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": "x" * 600}, "input", "context_length_exceeded"),
        ({"dimensions": 8}, "dimensions", "unsupported_parameter"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
)
def test_refusals(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().post(
            "/embeddings", body={"model": MODEL, "input": "x"} | fields, cast_to=object
        )
    assert (caught.value.param, caught.value.code) == (param, code)
