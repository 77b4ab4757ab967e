"""A server of `api_server` with a worker in a thread, and accounts in every bad standing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from api_server import Server, running
from openai import OpenAI

from data import accounts, safety
from data.settings import Settings
from train.worker import Worker, open_workshop


@contextmanager
def working(settings: Settings) -> Iterator[Server]:
    """Serve and train until the block ends."""
    with running(settings) as found:
        shop = open_workshop(settings)
        worker = threading.Thread(target=Worker(shop).run)
        worker.start()
        try:
            yield found
        finally:
            shop.stopping.set()
            worker.join()
            shop.database.close()


def bad_keys(server: Server) -> dict[str, str]:
    """Return keys that are refused: `unknown`, `suspended`, and `limited` to one request a day."""
    database = server.runtime.database
    suspended, suspended_key = server.new_account("suspended")
    safety.suspend(database, suspended.id, "For the test.")
    limited, limited_key = server.new_account("limited")
    _, key = accounts.create_admin_key(database)
    with OpenAI(base_url=f"{server.url}/v1", api_key=key, admin_api_key=key) as admin:
        admin.admin.organization.projects.rate_limits.update_rate_limit(
            f"rl-{server.runtime.models.base_model}",
            project_id=limited.id,
            max_requests_per_1_minute=1,
        )
    return {"unknown": "sk-wrong", "suspended": suspended_key, "limited": limited_key}
