"""`hone serve` as a process: ready line, signals, a port in use, bytes that are not HTTP."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from api_server import MODEL, tiny_settings

from data import accounts
from data.db import Database
from data.settings import Settings

HOST_PROGRAM = """
import sys
from pathlib import Path
from serve.background import running_server
with running_server(Path(sys.argv[1]), sys.argv[2:]) as base_url:
    print(base_url, flush=True)
    sys.stdin.read()
"""
READY = re.compile(r"hone is ready on (http://127\.0\.0\.1:(\d+)) \(model (\S+), \d+\.\d s\)")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return tiny_settings(tmp_path_factory.mktemp("process"))


def command(settings: Settings, *words: str) -> list[str]:
    base = [f"home={settings.home}", f"model={settings.model}", "dtype=float32", "port=0"]
    return [sys.executable, "-m", "serve.cli", "serve", *base, "embedded_worker=false", *words]


@contextmanager
def started(settings: Settings, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        command(settings, *words), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = READY.fullmatch(line.strip())
        assert match, line
        assert match[3] == settings.model
        yield process, match[1]
    finally:
        process.kill()
        process.communicate()


def key_of(settings: Settings, name: str) -> str:
    database = Database(settings.effective_database_url)
    database.migrate()
    _, key = accounts.create_account(database, name)
    database.close()
    return key


def check_bytes_that_are_not_http(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"type": "invalid_request_error"' in answer


def test_from_start_to_graceful_stop(settings: Settings) -> None:
    key = key_of(settings, "caller")
    with started(settings) as (process, url):
        check_bytes_that_are_not_http(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        options = {"model": MODEL, "prompt": "a", "temperature": 0, "max_tokens": 400}
        stream = client.completions.create(  # type: ignore[call-overload]
            **options, stream=True, extra_body={"ignore_eos": True}
        )
        text = next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGTERM)  # the answer in flight is finished
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert len(text) > 100
        assert process.wait(timeout=30) == 0


def test_port_in_use_is_told_before_the_model_is_loaded(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(settings, f"port={port}", "model=no-such-model"),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"hone: Cannot listen on 127.0.0.1:{port}: the port is in use" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_is_told_without_a_traceback(settings: Settings) -> None:
    done = subprocess.run(
        command(settings, "model=no-such-model"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert 'There is no base model "no-such-model"' in done.stderr
    assert "Traceback" not in done.stderr


def test_killing_the_server_takes_the_worker_along(settings: Settings) -> None:
    with started(settings, "embedded_worker=true") as (process, _):
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(process.pid).children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert (bool(gone), alive) == (True, [])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_does_not_outlive_the_program_that_runs_it(
    settings: Settings, how: signal.Signals
) -> None:
    words = [f"model={settings.model}", "dtype=float32", "embedded_worker=false"]
    program = subprocess.Popen(
        [sys.executable, "-c", HOST_PROGRAM, str(settings.home), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith("http://127.0.0.1:")
        servers = psutil.Process(program.pid).children()
        assert len(servers) == 1
        program.send_signal(how)
        _, alive = psutil.wait_procs(servers, timeout=30)
    assert alive == []
