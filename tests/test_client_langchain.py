"""langchain-openai, unchanged; it knows our refusal of a prompt that is too long as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api_server import MODEL, running, tiny_settings
from client_env import SCRIPTS, python_env, run_client

pytestmark = pytest.mark.slow


def test_chat_completions_embeddings_and_errors(tmp_path: Path) -> None:
    python = python_env("langchain", "langchain-openai==1.7.3")
    with running(tiny_settings(tmp_path, threads=1)) as server:
        given = {"url": f"{server.url}/v1", "key": server.key, "model": MODEL}
        told = run_client([python, SCRIPTS / "langchain_flow.py", json.dumps(given)])
        options = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        text = server.client().completions.create(prompt="The cat", **options).choices[0].text
    assert told["completions"]["text"] == text
    assert told["errors"] == {
        "chat too long": "ContextOverflowError",
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "value": "BadRequestError",
        "tools": "BadRequestError",
    }
