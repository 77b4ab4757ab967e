"""A real server on a real port inside the test process, over a tiny random base model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI
from tiny_models import save_tiny_base

from data import accounts
from data.settings import Settings
from data.tables import Project
from serve.app import create_app
from serve.runtime import Runtime, open_runtime
from serve.server import HttpProtocol

MODEL = "tiny-base"  # the name of the folder that holds it


@dataclass
class Server:
    """A running server and a first account."""

    url: str
    runtime: Runtime
    project: Project
    key: str
    clients: ExitStack

    def client(self, key: str | None = None) -> OpenAI:
        """Return the official client, which never retries here."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0)
        return self.clients.enter_context(client)

    def http(self, key: str | None = None) -> httpx.Client:
        """Return a plain client with the account's key."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        self.clients.callback(client.close)
        return client

    def new_account(self, name: str) -> tuple[Project, str]:
        """Make another account; returns it and its key."""
        return accounts.create_account(self.runtime.database, name)


def tiny_settings(home: Path, arch: str = "llama", **values: Any) -> Settings:
    """Return settings for a home folder with a tiny base model in it."""
    folder = home / MODEL
    if not folder.exists():
        save_tiny_base(folder, arch)
    defaults = {"embedded_worker": False, "dtype": "float32", "kv_cache_mb": 64}
    defaults["bias_reports"] = False  # half a second a job
    return Settings(home=home / "home", model=str(folder), **(defaults | values))


@contextmanager
def running(settings: Settings, wrap: Callable[[Any], Any] | None = None) -> Iterator[Server]:
    """Serve until the block ends.

    Args:
        wrap: Put around the ASGI application, to watch it.
    """
    runtime = open_runtime(settings)
    app: Any = create_app(settings, runtime)
    config = uvicorn.Config(
        app if wrap is None else wrap(app),
        http=HttpProtocol,
        port=0,
        log_config=None,
        access_log=False,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        project, key = accounts.create_account(runtime.database, "acme")
        with ExitStack() as clients:
            yield Server(f"http://127.0.0.1:{port}", runtime, project, key, clients)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
