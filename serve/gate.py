"""Whether a request may begin: the account's rates and its money, decided in memory.

Limits are read from the database when the server starts, every half second after that, and at once
when this server changes them. What was spent is known to the request, not only to the ledger.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import select

from data import limits, organization_limits, registry, webhooks
from data.db import Database
from data.errors import QuotaExceeded
from data.metering import Meter, Usage, month_of
from data.settings import Limits
from data.tables import now
from data.tables_metering import RateLimit, SpendLimit
from serve.limiter import DAY_S, MINUTE_S, Limiter, Rate, Reservation

log = logging.getLogger("hone.metering")


class Gate:
    """All accounts' rates and spend limits.

    Args:
        meter: Keeps the ledger that spending is read from.
        defaults: For accounts that have no limits of their own.
        base_model: Its limits hold for everything.
        clock: For the rates; returns seconds that only grow.
    """

    def __init__(
        self,
        database: Database,
        meter: Meter,
        defaults: Limits,
        base_model: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._database = database
        self._meter = meter
        self._base = base_model
        self._default = limits.default_rate(base_model, defaults)
        self._limiter = Limiter(clock)
        self._lock = threading.Lock()
        self._rates: dict[str, dict[str, RateLimit]] = {}
        self._money: dict[str, tuple[int, int]] = {}  # limit and spent, nano-dollars
        self._all: tuple[int, int] | None = None  # the same, of all accounts together
        self.refresh()

    def set_defaults(self, defaults: Limits) -> None:
        """Take other limits for accounts that have none of their own."""
        self._default = limits.default_rate(self._base, defaults)

    def refresh(self) -> None:
        """Read the limits again, and fire alerts whose sum is reached."""
        rates: dict[str, dict[str, RateLimit]] = {}
        with self._meter.held():
            with self._database.read() as session:
                for rate in limits.all_rates(session):
                    rates.setdefault(rate.project_id, {})[rate.model] = rate
                money = {
                    limit.project_id: (
                        limit.threshold_cents * limits.NANO_PER_CENT,
                        limits.spent(session, limit.project_id),
                    )
                    for limit in session.scalars(select(SpendLimit))
                }
                due = bool(limits.due_alerts(session))
                most = organization_limits.spend_limit(session)
                everything = 0 if most is None else organization_limits.spent(session)
            with self._lock:
                pending = self._meter.pending_costs()
                self._money = {
                    name: (limit, spent + pending.get(name, 0))
                    for name, (limit, spent) in money.items()
                }
                self._rates = rates
                self._all = None
                if most is not None:
                    spent = everything + sum(pending.values())
                    self._all = (most * limits.NANO_PER_CENT, spent)
        if due:
            self._fire()

    def check_money(self, project_id: str) -> None:
        """Refuse an account that has spent what it may.

        Raises:
            QuotaExceeded: It has, or all accounts together have spent what they may.
        """
        if self._all is not None and self._all[1] >= self._all[0]:
            raise QuotaExceeded(
                "You exceeded your current quota: this server has reached the spend limit that its "
                "operator set for all accounts together this month. It ends with the month (UTC), "
                "or when the operator raises it."
            )
        limit, spent = self._money.get(project_id, (1, 0))
        if spent >= limit:
            raise QuotaExceeded(
                "You exceeded your current quota: the account has reached its spend limit of "
                f"{limit / 1e9:.2f} USD for this month. It ends with the month (UTC), or when the "
                "server's operator raises the limit."
            )

    def record(self, usage: Usage) -> None:
        """Give a request's usage to the ledger, and count its cost at once."""
        with self._lock:
            if usage.project_id in self._money:
                limit, spent = self._money[usage.project_id]
                self._money[usage.project_id] = (limit, spent + self._meter.cost(usage))
            if self._all is not None:
                self._all = (self._all[0], self._all[1] + self._meter.cost(usage))
            self._meter.record(usage)

    def admit(
        self,
        project_id: str,
        model: str,
        prompt_tokens: int,
        tokens: int,
        *,
        is_free: bool = False,
    ) -> tuple[Reservation, dict[str, str]]:
        """Let a request begin; returns what it took and the headers that tell what is left.

        Args:
            prompt_tokens: Of its prompts.
            tokens: The most it can use, prompts included.
            is_free: It costs nothing, so that it may begin when all money is spent.

        Raises:
            QuotaExceeded: The account has spent what it may.
            RateLimited: It has used up what it may use in this time.
        """
        if not is_free:
            self.check_money(project_id)
        rates = self._rates_of(project_id, model)
        return self._limiter.take(rates, prompt_tokens, tokens), self._limiter.headers(rates)

    def extend(self, project_id: str, model: str) -> Reservation:
        """Count more tokens for a request that was admitted: later ones wait for them."""
        return self._limiter.extend(self._rates_of(project_id, model))

    def headers(self, project_id: str, model: str) -> dict[str, str]:
        """Return the headers that tell what is left."""
        return self._limiter.headers(self._rates_of(project_id, model))

    def _rates_of(self, project_id: str, model: str) -> list[Rate]:
        own = self._rates.get(project_id, {})
        found = [own.get(self._base, self._default)]
        if model != self._base:
            alias = registry.alias_of(model)
            found += [own[name] for name in (model, alias) if name in own]
        return [rate for record in found for rate in _rates(project_id, record)]

    def _fire(self) -> None:
        with self._database.write() as session:
            due = limits.due_alerts(session)
            for alert, spent in due:
                alert.fired_month = month_of(now())
                told = {
                    "id": alert.id,
                    "threshold_amount": alert.threshold_cents,
                    "spent_amount": spent // limits.NANO_PER_CENT,
                    "currency": "USD",
                }
                webhooks.enqueue(session, alert.project_id, "spend_alert.reached", now(), told)
        for alert, spent in due:
            log.warning(
                "spend alert %s: the account %s has spent %.2f USD this month, its threshold is "
                "%.2f USD; to be told: %s",
                alert.id,
                alert.project_id,
                spent / 1e9,
                alert.threshold_cents / 100,
                ", ".join(alert.recipients),
            )


def _rates(project_id: str, record: RateLimit) -> Sequence[Rate]:
    limited = (
        Rate(project_id, record.model, "requests", record.requests_per_minute, MINUTE_S)
        if record.requests_per_minute is not None
        else None,
        Rate(project_id, record.model, "tokens", record.tokens_per_minute, MINUTE_S)
        if record.tokens_per_minute is not None
        else None,
        Rate(project_id, record.model, "requests", record.requests_per_day, DAY_S)
        if record.requests_per_day is not None
        else None,
    )
    return [rate for rate in limited if rate is not None]
