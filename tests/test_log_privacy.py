"""Nothing of a customer's is in the logs: no prompt, no answer, no row, no key, at no level."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from test_api_process import READY, key_of

from serve import logs
from serve.logs import TEXT, JsonLines

SECRET = "quokka"  # in everything that is sent
BAD_KEY = f"sk-{SECRET}-of-nobody-0123456789"
CLIENTS = ("openai", "httpx", "httpcore")  # of the test itself


def send_everything(url: str, key: str) -> list[int]:
    """Send a secret in every way there is; returns the statuses."""
    chat = [{"role": "user", "content": f"{SECRET} chat", "name": SECRET}]
    row = json.dumps({"prompt": SECRET, "completion": f" {SECRET}"}).encode() + b"\n"
    posts: list[tuple[str, Any]] = [
        ("completions", {"prompt": SECRET, "max_tokens": 3, "user": SECRET, "echo": True}),
        ("completions", {"prompt": SECRET, "max_tokens": 3, "stream": True, "stop": SECRET}),
        ("completions", {"prompt": SECRET * 500}),  # too long
        ("completions", {"prompt": {"a": SECRET}}),
        ("completions", {"prompt": "a", SECRET: 1}),
        ("completions", {"prompt": "a", "n": SECRET}),
        ("completions", {"prompt": "a", "model": SECRET}),
        ("chat/completions", {"messages": chat, "max_tokens": 3, "store": True}),
        ("chat/completions", {"messages": chat, "max_tokens": 3, "stream": True}),
        ("chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
        ("embeddings", {"input": SECRET}),
        ("moderations", {"input": SECRET, "model": "omni-moderation-latest"}),
        ("tokenize", {"prompt": SECRET}),
        ("fine_tuning/jobs", {"training_file": "file-none", "metadata": {"a": SECRET}}),
        ("fine_tuning/alpha/graders/run", {"grader": {"type": SECRET}, "model_sample": SECRET}),
        ("api_keys", {"name": SECRET}),
    ]
    statuses = []
    with httpx.Client(base_url=f"{url}/v1/", timeout=60) as http:
        for good in (key, BAD_KEY):
            http.headers["authorization"] = f"Bearer {good}"
            for path, body in posts:
                answer = http.post(path, json={"model": MODEL} | body)
                statuses.append(answer.status_code)
            broken = http.post("completions", content=f'{{"prompt": "{SECRET}'.encode())
            statuses.append(broken.status_code)
            for content, purpose in ((row * 12, "fine-tune"), (SECRET.encode(), "fine-tune")):
                files = {"file": (f"{SECRET}.jsonl", content)}
                made = http.post("files", files=files, data={"purpose": purpose})
                statuses.append(made.status_code)
            statuses.append(http.get("models", params={SECRET: SECRET}).status_code)
            http.headers["authorization"] = f"Basic {good}"
            statuses.append(http.get("models").status_code)
    return statuses


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_real_server_at_the_most_talkative(tmp_path: Path, form: str) -> None:
    settings = tiny_settings(tmp_path)
    key = key_of(settings, "caller")
    words = [f"home={settings.home}", f"model={settings.model}", "dtype=float32", "port=0"]
    words += ["embedded_worker=true", "log_level=debug", f"log_format={form}"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        try:
            assert process.stdout is not None
            ready = READY.fullmatch(process.stdout.readline().strip())
            assert ready
            statuses = send_everything(ready[1], key)
            process.terminate()
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert {200, 400, 401, 404} <= set(statuses)
    written = log.read_text("utf-8")
    assert written.count("/v1/completions") >= 14
    for secret in (SECRET, key, key.removeprefix("sk-"), BAD_KEY):
        assert secret not in written
        assert secret not in rest


def test_urls_of_webhooks_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    levels = {name: logging.getLogger(name).level for name in logs.QUIET}
    try:
        logs.set_up("debug", "text")
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        assert not logging.getLogger("httpcore.http11").isEnabledFor(logging.DEBUG)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tiny_settings(tmp_path)) as found:
        yield found


def test_a_failing_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tracebacks of the engine and of a route that has a bug, while a secret is being answered."""
    caplog.set_level(logging.DEBUG)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    client = server.client()
    with monkeypatch.context() as broken:
        broken.setattr(server.runtime.engine._runner, "run", fail)  # type: ignore[attr-defined]
        for stream in (False, True):
            options: dict[str, Any] = {"prompt": SECRET, "stream": stream}
            with pytest.raises(openai.APIError):
                list(client.completions.create(model=MODEL, **options))
    with monkeypatch.context() as broken:
        broken.setattr(server.runtime.gate, "admit", fail)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": SECRET}]
            )
    records = [one for one in caplog.records if one.name.split(".")[0] not in CLIENTS]
    assert sum(record.exc_info is not None for record in records) >= 2
    for formatter in (logging.Formatter(TEXT), JsonLines()):
        written = "\n".join(map(formatter.format, records))
        assert "RuntimeError: broken" in written
        assert SECRET not in written
        assert server.key not in written
