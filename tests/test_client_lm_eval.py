"""lm-evaluation-harness finds over HTTP what it finds with transformers and PEFT in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import MODEL, running, tiny_settings
from client_env import SCRIPTS, python_env, run_client
from tiny_models import random_adapter, tiny_model

pytestmark = pytest.mark.slow

PACKAGES = (
    "lm-eval[api]==0.4.13",
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
)
TOLERANCE = 1e-3  # of a log-likelihood


def import_adapter(http: httpx.Client, folder: Path) -> str:
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    files = {field: (folder / name).read_bytes() for field, name in names.items()}
    answer = http.post("/v1/adapters", files=files, data={"suffix": "random"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run found: base and adapter, over HTTP and in process."""
    python = python_env("lm-eval", *PACKAGES, constrained=True)
    home = tmp_path_factory.mktemp("lm-eval")
    (home / "tasks").mkdir()
    adapter = random_adapter(tiny_model("llama"), home / "adapter")
    with running(tiny_settings(home, threads=1)) as server:
        http = {"base_url": f"{server.url}/v1/completions", "max_length": 512}
        local = {"pretrained": str(home / MODEL), "device": "cpu", "dtype": "float32"}
        remote_tokenizer = {**http, "auth_token": server.key, "num_concurrent": 4}
        own_tokenizer = {**http, "tokenizer": str(home / MODEL), "batch_size": 4}
        tuned = import_adapter(server.http(), adapter)
        runs = {
            "base": ["local-completions", {**remote_tokenizer, "model": MODEL}],
            "base, batches": ["local-completions", {**own_tokenizer, "model": MODEL}],
            "base in process": ["hf", local],
            "adapter": ["local-completions", {**own_tokenizer, "model": tuned}],
            "adapter in process": ["hf", {**local, "peft": str(adapter)}],
        }
        given = {"url": server.url, "key": server.key, "folder": str(home / "tasks")}
        given["runs"] = runs
        return run_client([python, SCRIPTS / "lm_eval_flow.py", json.dumps(given)], 600)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("base", "base in process"),
        ("base, batches", "base in process"),
        ("adapter", "adapter in process"),
    ],
)
def test_the_same_over_http(found: dict[str, Any], ours: str, theirs: str) -> None:
    got, expected = found[ours], found[theirs]
    assert (got["acc"], got["acc_norm"]) == (expected["acc"], expected["acc_norm"])
    assert got["texts"] == expected["texts"]
    assert len(got["choices"]) == 44
    for row, other in zip(got["choices"], expected["choices"], strict=True):
        for (value, greedy), (reference, reference_greedy) in zip(row, other, strict=True):
            assert value == pytest.approx(reference, abs=TOLERANCE)
            assert greedy == reference_greedy


def test_the_rows_tell_something(found: dict[str, Any]) -> None:
    for run in found.values():
        assert {greedy for row in run["choices"] for _, greedy in row} == {"True", "False"}
        assert len(set(run["texts"])) > 3


def test_the_adapter_makes_a_difference(found: dict[str, Any]) -> None:
    assert found["adapter"]["texts"] != found["base"]["texts"]
    assert found["adapter"]["choices"] != found["base"]["choices"]
