"""What all accounts together may spend in a calendar month (UTC). Money is in cents of USD."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import NotFound
from data.metering import month_of
from data.tables import now
from data.tables_metering import MonthlySpend, OrganizationLimit

SPEND = "spend_cents"
NANO_PER_CENT = 10_000_000


def get(database: Database) -> tuple[int, int]:
    """Return the limit and what was spent this month, in whole cents; raises NotFound."""
    with database.read() as session:
        found = spend_limit(session)
        if found is None:
            raise NotFound("The organization has no spend limit.")
        return found, spent(session) // NANO_PER_CENT


def replace(database: Database, threshold_cents: int) -> None:
    """Limit what all accounts together may spend in a month."""
    with database.write() as session:
        session.merge(OrganizationLimit(name=SPEND, value=threshold_cents))
        audit.record(
            session, "spend_limit.updated", "organization", None, threshold_cents=threshold_cents
        )


def clear(database: Database) -> None:
    """Remove the limit; raises NotFound."""
    with database.write() as session:
        found = session.get(OrganizationLimit, SPEND)
        if found is None:
            raise NotFound("The organization has no spend limit.")
        session.delete(found)
        audit.record(session, "spend_limit.deleted", "organization", None)


def spend_limit(session: Session) -> int | None:
    """Return the limit in cents, if there is one."""
    found = session.get(OrganizationLimit, SPEND)
    return None if found is None else found.value


def spent(session: Session) -> int:
    """Return what all accounts have spent this month, in nano-dollars."""
    query = select(func.coalesce(func.sum(MonthlySpend.cost), 0))
    return int(session.scalar(query.where(MonthlySpend.month == month_of(now()))) or 0)
