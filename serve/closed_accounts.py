"""What becomes of suspended and archived accounts: cut off within seconds, whoever closed them.

The database is looked at every second, so that a command line, or another server, can close an
account too.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.concurrency import run_in_threadpool

from data import accounts, safety
from serve.runtime import Runtime

POLL_S = 1.0

log = logging.getLogger("hone.accounts")


async def watch(runtime: Runtime) -> None:
    """Look until cancelled."""
    while True:
        try:
            await look(runtime)
        except Exception:
            log.exception("the accounts could not be read; trying again")
        await asyncio.sleep(POLL_S)


async def look(runtime: Runtime) -> None:
    """Refuse closed accounts, end their streams, and unload their adapters."""
    closed = await run_in_threadpool(safety.closed_accounts, runtime.database)
    if not closed and not runtime.generator.closed:
        return
    runtime.generator.close_accounts(
        {i: accounts.closed(p.slug, p.status, p.case_id) for i, p in closed.items()}
    )
    for state in await run_in_threadpool(runtime.engine.adapters):
        if state.owner in closed and state.tier != "disk":
            await run_in_threadpool(runtime.engine.unload_adapter, state.digest)
