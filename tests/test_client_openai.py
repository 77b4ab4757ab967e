"""openai-python, the newest release and the last 1.x: one script, unchanged, on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import MODEL, tiny_settings
from client_env import SCRIPTS, python_env, run_client
from working_server import bad_keys, working

pytestmark = pytest.mark.slow

ERRORS: dict[str, list[Any]] = {
    "key": ["AuthenticationError", 401, "invalid_api_key", None],
    "suspended": ["PermissionDeniedError", 403, "account_suspended", None],
    "project": ["PermissionDeniedError", 403, "insufficient_permissions", None],
    "model": ["NotFoundError", 404, "model_not_found", "model"],
    "value": ["BadRequestError", 400, "invalid_value", "temperature"],
    "unknown": ["BadRequestError", 400, "unknown_parameter", "temprature"],
    "context": ["BadRequestError", 400, "context_length_exceeded", "prompt"],
    "rate": ["RateLimitError", 429, "rate_limit_exceeded", None],
    "file": ["BadRequestError", 400, "invalid_value", "training_file"],
    "rows": ["BadRequestError", 400, "invalid_file_format", "file"],
    "after": ["BadRequestError", 400, "invalid_value", "after"],
    "url": ["NotFoundError", 404, "unknown_url", None],
    "method": ["APIStatusError", 405, "method_not_allowed", None],
}


@pytest.mark.parametrize("version", ["3.54.0", "1.109.1"])
def test_the_whole_flow(version: str, tmp_path: Path) -> None:
    python = python_env(f"openai-{version}", f"openai=={version}")
    with working(tiny_settings(tmp_path, threads=1)) as server:
        given = {"url": f"{server.url}/v1", "key": server.key, "model": MODEL}
        given["keys"] = bad_keys(server)
        told = run_client([python, SCRIPTS / "openai_flow.py", json.dumps(given)])
    assert told["version"] == version
    assert told["errors"] == ERRORS
