"""Sends what is in the webhooks' outbox, in the background of the server.

Each attempt looks the receiver's address up, refuses one inside the operator's network, and
connects to the very address that was checked. Redirects are not followed, answers are not read.
What fails is tried again, later each time; several servers may share the outbox.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial

import httpx
from anyio import to_thread
from starlette.concurrency import run_in_threadpool

from data import webhooks
from data.db import Database
from data.errors import InvalidInput
from data.settings import Settings
from data.tables_jobs import WebhookDelivery, WebhookEndpoint
from data.web_address import resolve_public

POLL_S = 1.0
AT_ONCE = 32
PER_ACCOUNT = 4  # so that the slow receivers of one hold up nobody else
MAX_ATTEMPTS = 9  # the last comes 3280 times `webhook_retry_s` after the first: 4.5 hours
LEASE_MARGIN_S = 30.0

log = logging.getLogger("hone.webhooks")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt; `error` is None when it arrived."""

    status_code: int | None
    error: str | None


class WebhookSender:
    """Delivers events until stopped."""

    def __init__(self, database: Database, settings: Settings):
        self._database = database
        self._settings = settings
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to deliver."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop; what is under way is tried again after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        under_way: dict[asyncio.Task[None], str] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                due = await self._claim(AT_ONCE - len(under_way), Counter(under_way.values()))
                for delivery, endpoint in due:
                    task = group.create_task(self._deliver(delivery, endpoint))
                    under_way[task] = endpoint.project_id
                    task.add_done_callback(under_way.pop)
                if due:
                    continue
                if under_way:
                    await asyncio.wait(
                        under_way, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
                    )
                else:
                    await asyncio.sleep(POLL_S)

    async def _claim(
        self, room: int, under_way: Counter[str]
    ) -> list[tuple[WebhookDelivery, WebhookEndpoint]]:
        if room == 0:
            return []
        lease_s = self._settings.webhook_timeout_s + LEASE_MARGIN_S
        given = (self._database, room, lease_s, PER_ACCOUNT, under_way)
        try:
            return await run_in_threadpool(webhooks.claim_due, *given)
        except Exception:
            log.exception("webhooks could not be read; trying again")
            return []

    async def _deliver(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint) -> None:
        outcome = await send(endpoint, delivery.event_id, delivery.body, self._settings)
        attempt = delivery.attempts + 1
        retry_s = None
        if outcome.error is not None and attempt < MAX_ATTEMPTS:
            retry_s = self._settings.webhook_retry_s * 3.0 ** (attempt - 1)
        if outcome.error is not None:
            then = "giving up" if retry_s is None else f"again in {retry_s:.0f} s"
            log.warning("%s to %s: %s; %s", delivery.id, endpoint.id, outcome.error, then)
        told = (delivery.id, outcome.status_code, outcome.error, retry_s)
        try:
            await run_in_threadpool(webhooks.settle, self._database, *told)
        except Exception:  # its lease runs out, and it is sent again
            log.exception("%s could not be settled", delivery.id)


async def send(endpoint: WebhookEndpoint, event_id: str, body: str, settings: Settings) -> Outcome:
    """Make one attempt to deliver an event; every failure becomes the outcome's error."""
    try:
        async with asyncio.timeout(settings.webhook_timeout_s):
            return await _post(endpoint, event_id, body, settings.webhooks_allow_private)
    except TimeoutError:
        return Outcome(None, f"no answer within {settings.webhook_timeout_s:g} s")
    except InvalidInput as error:
        return Outcome(None, error.message)
    except (OSError, UnicodeError, httpx.HTTPError, httpx.InvalidURL) as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    except Exception as error:
        log.exception("an event could not be sent to %s", endpoint.id)
        return Outcome(None, f"{type(error).__name__}: {error}")


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Return what certificates are checked with; reading them takes a while."""
    return httpx.create_ssl_context()


async def _post(
    endpoint: WebhookEndpoint, event_id: str, body: str, allow_private: bool
) -> Outcome:
    url = httpx.URL(endpoint.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    lookup = partial(resolve_public, url.host, port, allow_private=allow_private)
    address = await to_thread.run_sync(lookup, abandon_on_cancel=True)  # names can be slow
    tls = await run_in_threadpool(_tls)
    headers = webhooks.headers_of(endpoint, event_id, body)
    headers["host"] = url.netloc.decode()
    # The name is for the certificate and the Host header; the connection is to what was checked.
    async with (
        httpx.AsyncClient(verify=tls, trust_env=False, follow_redirects=False) as client,
        client.stream(
            "POST",
            url.copy_with(host=address),
            content=body.encode(),
            headers=headers,
            extensions={"sni_hostname": url.host},
            timeout=None,
        ) as response,
    ):
        code = response.status_code
    return Outcome(code, None if 200 <= code < 300 else f"the receiver answered {code}")
