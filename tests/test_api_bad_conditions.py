"""Crowds, clients that take nothing, and a server that is stopped in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import httpx
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from test_api_process import key_of, started

from serve.api import stream

LONG = {"ignore_eos": True}
BODY = {"model": MODEL, "prompt": "The cat", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = tiny_settings(tmp_path_factory.mktemp("crowd"), max_batch=4, queue_size=64)
    with running(settings) as found:
        yield found


def test_200_clients_and_a_queue_of_64(server: Server) -> None:
    body = {**BODY, "max_tokens": 60}
    expected = server.http().post("/v1/completions", json=body).json()["choices"]
    limits = httpx.Limits(max_connections=200)
    headers = {"authorization": f"Bearer {server.key}"}
    with (
        httpx.Client(base_url=server.url, headers=headers, limits=limits, timeout=120) as http,
        ThreadPoolExecutor(200) as pool,
    ):
        answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(200)))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(served) + len(refused) == 200
    assert len(served) >= 64
    assert refused
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert all(answer.json()["choices"] == expected for answer in served)
    assert server.http().get("/health").status_code == 200
    assert server.http().post("/v1/completions", json=body).json()["choices"] == expected


def test_a_client_that_reads_nothing_harms_nobody(server: Server) -> None:
    body = json.dumps({**BODY, "max_tokens": 400, "n": 32, "stream": True, "logprobs": 5}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")
    silent = socket.socket()
    silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    silent.connect((host, int(port)))
    with silent:
        silent.sendall(head.encode() + body)
        small = {**BODY, "max_tokens": 5}
        for _ in range(5):
            assert server.http().post("/v1/completions", json=small).status_code == 200
    deadline = time.monotonic() + 60
    while server.runtime.engine.stats()["requests_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.runtime.engine.stats()["requests_running"] == 0


def test_a_connection_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_LIMIT_S", 0.05)
    sent: list[Any] = []
    closed = False

    async def frames() -> AsyncGenerator[list[dict[str, Any]], None]:
        nonlocal closed
        try:
            while True:
                yield [{"n": 1}]
        finally:
            closed = True

    async def send(message: Any) -> None:
        if len(sent) >= 3:
            await asyncio.sleep(60)
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)

    scope = {"type": "http", "state": {"request_id": "req_1"}}
    asyncio.run(stream.EventStream([{"n": 0}], frames())(scope, receive, send))
    assert closed
    assert sent[-1].get("more_body")  # no end was sent: the server cuts the connection


@pytest.mark.parametrize("grace", [0, 1])
def test_a_stopped_server_ends_a_stream_with_an_error(
    tmp_path_factory: pytest.TempPathFactory, grace: int
) -> None:
    """And a call that is not streamed with 503; nothing ever looks whole."""
    settings = tiny_settings(tmp_path_factory.mktemp("stopped"))
    key = key_of(settings, "caller")
    words = (f"shutdown_grace_s={grace}", "max_batch=1")
    with started(settings, *words) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        answer = client.completions.create(
            model=MODEL, prompt="The cat", max_tokens=480, n=100, stream=True, extra_body=LONG
        )
        next(iter(answer))
        with begun(url, key, {**BODY, "max_tokens": 480, "n": 100}) as whole:
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError) as caught:
                for _ in answer:
                    pass
            assert caught.value.code == "server_stopping"
            assert process.wait(timeout=30) == 0
            ended = HTTPResponse(whole)
            ended.begin()
            assert ended.status == 503
            assert json.loads(ended.read())["error"]["code"] == "server_stopping"
            assert ended.headers["retry-after"] == "1"


@contextmanager
def begun(url: str, key: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request of which the server has surely taken the head."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
        "expect: 100-continue\r\n\r\n"
    )
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        yield connection


def test_a_second_signal_ends_the_server_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = tiny_settings(tmp_path_factory.mktemp("twice"))
    key = key_of(settings, "caller")
    with started(settings, "shutdown_grace_s=600", "max_batch=1") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        answer = client.completions.create(
            model=MODEL, prompt="The cat", max_tokens=480, n=128, stream=True, extra_body=LONG
        )
        next(iter(answer))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None  # it waits for the answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 128 + signal.SIGTERM
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            for _ in answer:
                pass
