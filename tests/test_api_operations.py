"""Running a server: logs as JSON lines, settings read again, web pages of other origins."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from api_server import MODEL, Server, running, tiny_settings
from test_api_process import READY, key_of

from data.errors import ConfigError
from data.settings import Limits, Settings
from serve.logs import FIELDS, JsonLines
from serve.reload import reload


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return tiny_settings(tmp_path_factory.mktemp("operations"), cors_origins=("https://a.example",))


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    with running(settings) as found:
        yield found


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def test_a_record_is_one_json_object() -> None:
    record = logging.LogRecord("hone.x", logging.WARNING, "f", 1, "line\n%s", ("two",), None)
    setattr(record, FIELDS, {"status": 200, "account": None})
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time") == pytest.approx(time.time(), abs=60)
    assert found == {
        "level": "warning",
        "logger": "hone.x",
        "message": "line\ntwo",
        "status": 200,
        "account": None,
    }


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ValueError: why" in json.loads(line)["traceback"]


def test_limits_change_while_the_server_runs(server: Server, settings: Settings) -> None:
    runtime = server.runtime
    changed = settings.model_copy(update={"request_timeout_s": 0.001, "log_level": "error"})
    body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    try:
        assert reload(runtime, lambda: changed)
        answer = server.http().post("/v1/completions", json=body)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
    finally:
        assert reload(runtime, lambda: settings)
    assert server.http().post("/v1/completions", json=body).status_code == 200


def test_a_changed_limit_holds_for_files(server: Server, settings: Settings) -> None:
    changed = settings.model_copy(update={"limits": Limits(stored_mb=0)})
    files = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')}

    def upload() -> httpx.Response:
        return server.http().post("/v1/files", files=files, data={"purpose": "fine-tune"})

    try:
        assert reload(server.runtime, lambda: changed)
        assert upload().json()["error"]["code"] == "insufficient_quota"
    finally:
        assert reload(server.runtime, lambda: settings)
    assert upload().status_code == 200


def test_what_only_a_start_can_apply_changes_nothing(
    server: Server, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    changed = settings.model_copy(update={"port": 1, "queue_size": 3})
    assert not reload(server.runtime, lambda: changed)
    assert "port can change only at a start" in caplog.text
    assert server.runtime.settings == settings


def test_a_wrong_file_changes_nothing(
    server: Server, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> Settings:
        raise ConfigError(["x.yaml:3: unknown key"])

    assert not reload(server.runtime, read)
    assert "x.yaml:3: unknown key" in caplog.text
    assert server.runtime.settings == settings


def test_hangup_of_a_real_server(tmp_path: Path) -> None:
    base = tiny_settings(tmp_path)
    config = tmp_path / "hone.yaml"
    values: dict[str, Any] = {
        "home": str(base.home),
        "model": base.model,
        "dtype": "float32",
        "port": 0,
        "embedded_worker": False,
        "log_format": "json",
    }
    config.write_text(yaml.safe_dump(values))
    key = key_of(base, "caller")
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "serve.cli", "serve", "--config", str(config)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        assert process.stdout is not None
        match = READY.fullmatch(process.stdout.readline().strip())
        assert match
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{match[1]}/v1/models", headers=headers).status_code == 200
        config.write_text(yaml.safe_dump({**values, "queue_size": 7}))
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while "queue_size=7" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{match[1]}/v1/models", headers=headers).status_code == 200
        while (tmp_path / "log").read_text().count("GET /v1/models") < 2:  # told after the answer
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
        log.close()
    written = (tmp_path / "log").read_text().splitlines()
    lines = [json.loads(line) for line in written if line.startswith("{")]  # after progress bars
    asked = [line for line in lines if line.get("route") == "/v1/models"]
    assert len(asked) == 2
    assert asked[0]["status"] == 200
    assert asked[0]["request_id"].startswith("req_")
    assert asked[0]["account"].startswith("proj_")


def test_web_pages_of_allowed_origins(server: Server) -> None:
    asks = {"access-control-request-method": "POST", "origin": "https://a.example"}
    asks["access-control-request-headers"] = "authorization,openai-project,x-stainless-os"
    allowed = httpx.options(f"{server.url}/v1/completions", headers=asks)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    answer = server.http().get("/v1/models", headers={"origin": "https://a.example"})
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = httpx.options(
        f"{server.url}/v1/completions", headers=asks | {"origin": "https://b.example"}
    )
    assert "access-control-allow-origin" not in other.headers
