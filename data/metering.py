"""The usage ledger: what each request used, written in batches by a thread of its own.

`record` only appends to a list in memory, so that it may be called from the engine's thread. Every
half second, and at the end, the list becomes rows in one transaction together with the accounts'
monthly sums. A database that cannot be written to delays the rows but loses none; a killed process
loses at most what is not yet written, half a second's worth.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from data.db import Database
from data.settings import Prices
from data.tables import Job, now
from data.tables_metering import MonthlySpend, UsageRecord

FLUSH_S = 0.5
RECENT_JOBS_S = 24 * 3600
FINAL_JOBS = ("succeeded", "failed", "cancelled")
Status = Literal["complete", "aborted", "error"]

log = logging.getLogger("hone.metering")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used.

    Attributes:
        kind: "completions", "embeddings", "moderations", "training".
        prompt_tokens: Cached ones included.
        created_at: Unix seconds.
    """

    project_id: str
    model: str
    request_id: str
    key_id: str | None = None
    kind: str = "completions"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1
    end_user: str | None = None
    status: Status = "complete"
    batch: bool = False
    created_at: int = field(default_factory=now)


class Meter:
    """Takes what was used and keeps it.

    Args:
        database: Where the ledger is.
        prices: USD per million tokens, applied when a request is recorded.
    """

    def __init__(self, database: Database, prices: Prices):
        self._database = database
        self._prices = prices
        self._on_tick: Callable[[], None] = lambda: None
        self._pending: list[Usage] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # one flush at a time
        self._jobs_since = 0  # the first time, all jobs are looked at
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hone-meter", daemon=True)

    def set_prices(self, prices: Prices) -> None:
        """Take other prices for what comes from now on."""
        self._prices = prices

    def start(self, on_tick: Callable[[], None] = lambda: None) -> Meter:
        """Start the thread that writes; it calls `on_tick` after each round."""
        self._on_tick = on_tick
        self._thread.start()
        return self

    def record(self, usage: Usage) -> None:
        """Take one request's usage; never blocks on the database."""
        with self._lock:
            self._pending.append(usage)

    def cost(self, usage: Usage) -> int:
        """Return the price of a request, in nano-dollars."""
        return sum(costs(usage, self._prices))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write nothing until the block ends, so that ledger and `pending_costs` fit together."""
        with self._writing:
            yield

    def pending_costs(self) -> dict[str, int]:
        """Return each account's costs that are not in the ledger yet, in nano-dollars."""
        found: defaultdict[str, int] = defaultdict(int)
        with self._lock:
            for usage in self._pending:
                found[usage.project_id] += self.cost(usage)
        return found

    def flush(self) -> None:
        """Write what was recorded until now, and training that ended meanwhile.

        Raises:
            SQLAlchemyError: The database could not be written to; nothing is lost.
        """
        with self._writing:
            with self._lock:
                taken, self._pending = self._pending, []
            try:
                with self._database.read() as session:
                    ended = _unbilled_jobs(session, self._jobs_since)
                if taken or ended:
                    with self._database.write() as session:
                        ended = _unbilled_jobs(session, self._jobs_since)
                        _write(session, taken + ended, self._prices)
                self._jobs_since = now() - RECENT_JOBS_S
            except BaseException:
                with self._lock:
                    self._pending = taken + self._pending
                raise

    def close(self) -> None:
        """Write the rest and stop the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._stopped.wait(FLUSH_S):
            try:
                self.flush()
                self._on_tick()
            except Exception:  # whatever it is, what comes after is still to be written
                log.exception("the usage ledger could not be written; it is tried again")


def month_of(moment: int) -> str:
    """Return the calendar month (UTC) of a unix time, as 2026-11."""
    return time.strftime("%Y-%m", time.gmtime(moment))


def costs(usage: Usage, prices: Prices) -> tuple[int, int, int]:
    """Return the costs of computed prompt, cached prompt and completion, in nano-dollars."""
    if usage.kind == "training":
        return round(usage.prompt_tokens * prices.training * 1000), 0, 0
    if usage.kind == "moderations":
        return 0, 0, 0
    computed = usage.prompt_tokens - usage.cached_tokens
    return (
        round(computed * prices.prompt * 1000),
        round(usage.cached_tokens * prices.cached * 1000),
        round(usage.completion_tokens * prices.completion * 1000),
    )


def _write(session: Session, taken: list[Usage], prices: Prices) -> None:
    spent: defaultdict[tuple[str, str], int] = defaultdict(int)
    for usage in taken:
        prompt, cached, completion = costs(usage, prices)
        spent[usage.project_id, month_of(usage.created_at)] += prompt + cached + completion
        session.add(
            UsageRecord(
                created_at=usage.created_at,
                kind=usage.kind,
                project_id=usage.project_id,
                key_id=usage.key_id,
                model=usage.model,
                end_user=_storable(usage.end_user),
                request_id=usage.request_id,
                status=usage.status,
                batch=usage.batch,
                requests=usage.requests,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                prompt_cost=prompt,
                cached_cost=cached,
                completion_cost=completion,
            )
        )
    for (project_id, month), cost in sorted(spent.items()):
        if cost:
            _add_spend(session, project_id, month, cost)


def _storable(text: str | None) -> str | None:
    """Replace what PostgreSQL cannot store: one odd name must not hold up the ledger."""
    return None if text is None else text.replace("\0", "\ufffd")


def _add_spend(session: Session, project_id: str, month: str, cost: int) -> None:
    found = session.execute(
        update(MonthlySpend)
        .where(MonthlySpend.project_id == project_id, MonthlySpend.month == month)
        .values(cost=MonthlySpend.cost + cost)
        .returning(MonthlySpend.cost)
    ).first()
    if found is None:
        session.add(MonthlySpend(project_id=project_id, month=month, cost=cost))
        session.flush()


def _unbilled_jobs(session: Session, since: int) -> list[Usage]:
    """Return the training of jobs that ended and are not in the ledger yet."""
    billed = select(UsageRecord.seq).where(UsageRecord.request_id == Job.id).exists()
    query = select(Job).where(
        Job.status.in_(FINAL_JOBS), Job.finished_at >= since, Job.trained_tokens > 0, ~billed
    )
    return [
        Usage(
            project_id=job.project_id,
            model=job.model,
            request_id=job.id,
            kind="training",
            prompt_tokens=job.trained_tokens or 0,
            requests=0,
            status="complete" if job.status == "succeeded" else "error",
            created_at=job.finished_at or now(),
        )
        for job in session.scalars(query)
    ]
