"""openai-node, unchanged: the same flow as openai-python, files sent as streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from api_server import MODEL, tiny_settings
from client_env import SCRIPTS, node_env, run_client
from test_client_openai import ERRORS
from working_server import bad_keys, working

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="Node and npm are not installed"),
]


def test_the_whole_flow(tmp_path: Path) -> None:
    folder = node_env("node", "openai@7.57.0")
    with working(tiny_settings(tmp_path, threads=1)) as server:
        given = {"url": f"{server.url}/v1", "key": server.key, "model": MODEL}
        given["keys"] = bad_keys(server)
        told = run_client(["node", SCRIPTS / "node_flow.mjs", folder, json.dumps(given)])
    names = {"APIStatusError": "APIError"}  # Node has one class for every other status
    expected = {k: [names.get(v[0], v[0]), *v[1:]] for k, v in ERRORS.items()}
    assert told["errors"] == expected
