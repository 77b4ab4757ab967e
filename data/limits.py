"""How fast an account may call, and what it may spend in a month.

An account without limits of its own has those of the deployment's settings. The limits of a base
model hold for all that the account asks of it, its adapters included; an adapter may have limits of
its own besides. Money is in cents of USD here and in nano-dollars in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import audit, registry
from data.db import Database
from data.errors import NotFound
from data.metering import month_of
from data.settings import Limits
from data.tables import Alias, Project, new_id, now
from data.tables_metering import MonthlySpend, RateLimit, SpendAlert, SpendLimit

NANO_PER_CENT = 10_000_000
RATE_PREFIX = "rl-"
RATE_FIELDS = ("requests_per_minute", "tokens_per_minute", "requests_per_day")


def default_rate(model: str, limits: Limits, project_id: str = "") -> RateLimit:
    """Return the limits of an account that has none of its own, as an unsaved record."""
    return RateLimit(
        project_id=project_id,
        model=model,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        requests_per_day=limits.requests_per_day,
    )


def list_rates(
    database: Database, project_id: str, base_model: str, limits: Limits
) -> list[RateLimit]:
    """Return an account's limits of the base model and of each of its adapters' names.

    Raises:
        NotFound: There is no such account.
    """
    with database.read() as session:
        _project(session, project_id)
        stored = {
            rate.model: rate
            for rate in session.scalars(select(RateLimit).where(RateLimit.project_id == project_id))
        }
        aliases = session.scalars(select(Alias.name).where(Alias.project_id == project_id))
        names = sorted({*stored, *aliases} - {base_model})
    base = stored.get(base_model) or default_rate(base_model, limits, project_id)
    unlimited = Limits()
    return [base, *(stored.get(name) or default_rate(name, unlimited) for name in names)]


def update_rate(
    database: Database,
    project_id: str,
    rate_id: str,
    base_model: str,
    limits: Limits,
    changes: Mapping[str, int | None],
) -> RateLimit:
    """Change an account's limits of one model; what is not named stays as it is.

    Args:
        rate_id: `rl-` and the name of the base model, or of an adapter of this account.
        changes: Of `RATE_FIELDS`; None is unlimited.

    Raises:
        NotFound: There is no such account, or no such model of it.
    """
    model = rate_id.removeprefix(RATE_PREFIX)
    with database.read() as session:
        _project(session, project_id)
    if model != base_model or not rate_id.startswith(RATE_PREFIX):
        try:
            registry.resolve(database, project_id, model if model != rate_id else "")
        except NotFound:
            raise NotFound(f"No such limit: {rate_id}", param="rate_limit_id") from None
    with database.write() as session:
        default = limits if model == base_model else Limits()
        return put_rate(session, project_id, model, default, changes)


def put_rate(
    session: Session,
    project_id: str,
    model: str,
    default: Limits,
    changes: Mapping[str, int | None],
) -> RateLimit:
    """Change limits in a transaction; without any yet, they begin as the default's."""
    rate = session.get(RateLimit, (project_id, model))
    if rate is None:
        rate = default_rate(model, default, project_id)
        session.add(rate)
    for name, value in changes.items():
        setattr(rate, name, value)
    rate.updated_at = now()
    audit.record(session, "rate_limit.updated", f"{RATE_PREFIX}{model}", project_id, **changes)
    return rate


def all_rates(session: Session) -> Sequence[RateLimit]:
    """Return every account's own limits."""
    return session.scalars(select(RateLimit)).all()


def get_spend_limit(database: Database, project_id: str) -> tuple[int, int]:
    """Return the monthly limit and what was spent this month, both in cents (the latter whole).

    Raises:
        NotFound: There is no such account, or it has no limit.
    """
    with database.read() as session:
        _project(session, project_id)
        record = session.get(SpendLimit, project_id)
        if record is None:
            raise NotFound(f"The project {project_id} has no spend limit", param="project_id")
        return record.threshold_cents, spent(session, project_id) // NANO_PER_CENT


def set_spend_limit(database: Database, project_id: str, threshold_cents: int) -> None:
    """Limit what an account may spend in a calendar month (UTC).

    Raises:
        NotFound: There is no such account.
    """
    with database.write() as session:
        _project(session, project_id)
        put_spend_limit(session, project_id, threshold_cents)


def put_spend_limit(session: Session, project_id: str, threshold_cents: int) -> None:
    """Set a limit in a transaction."""
    session.merge(SpendLimit(project_id=project_id, threshold_cents=threshold_cents))
    audit.record(
        session, "spend_limit.updated", project_id, project_id, threshold_cents=threshold_cents
    )


def clear_spend_limit(database: Database, project_id: str) -> None:
    """Let an account spend without a limit.

    Raises:
        NotFound: There is no such account, or it has no limit.
    """
    with database.write() as session:
        _project(session, project_id)
        record = session.get(SpendLimit, project_id)
        if record is None:
            raise NotFound(f"The project {project_id} has no spend limit", param="project_id")
        session.delete(record)
        audit.record(session, "spend_limit.deleted", project_id, project_id)


def spent(session: Session, project_id: str) -> int:
    """Return what an account has spent this month, in nano-dollars."""
    record = session.get(MonthlySpend, (project_id, month_of(now())))
    return 0 if record is None else record.cost


def list_alerts(database: Database, project_id: str) -> list[SpendAlert]:
    """Return an account's alerts, oldest first.

    Raises:
        NotFound: There is no such account.
    """
    query = select(SpendAlert).where(SpendAlert.project_id == project_id)
    with database.read() as session:
        _project(session, project_id)
        return list(session.scalars(query.order_by(SpendAlert.created_at, SpendAlert.id)))


def save_alert(
    database: Database,
    project_id: str,
    alert_id: str | None,
    threshold_cents: int,
    recipients: Sequence[str],
    subject_prefix: str | None,
) -> SpendAlert:
    """Make an alert, or change the one with that id; a changed one may fire again.

    Raises:
        NotFound: There is no such account, or no such alert of it.
    """
    with database.write() as session:
        _project(session, project_id)
        if alert_id is None:
            alert = SpendAlert(id=new_id("alert_"), project_id=project_id)
            session.add(alert)
        else:
            alert = _alert(session, project_id, alert_id)
        alert.threshold_cents = threshold_cents
        alert.recipients = list(recipients)
        alert.subject_prefix = subject_prefix
        alert.fired_month = None
    return alert


def get_alert(database: Database, project_id: str, alert_id: str) -> SpendAlert:
    """Return an alert.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    with database.read() as session:
        _project(session, project_id)
        return _alert(session, project_id, alert_id)


def delete_alert(database: Database, project_id: str, alert_id: str) -> None:
    """Remove an alert.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    with database.write() as session:
        _project(session, project_id)
        session.delete(_alert(session, project_id, alert_id))


def due_alerts(session: Session) -> list[tuple[SpendAlert, int]]:
    """Return the alerts to tell of, once a month, and what their accounts have spent."""
    month = month_of(now())
    query = (
        select(SpendAlert, MonthlySpend.cost)
        .join(MonthlySpend, MonthlySpend.project_id == SpendAlert.project_id)
        .where(
            MonthlySpend.month == month,
            MonthlySpend.cost >= SpendAlert.threshold_cents * NANO_PER_CENT,
            SpendAlert.fired_month.is_distinct_from(month),
        )
    )
    return [(alert, cost) for alert, cost in session.execute(query)]


def _project(session: Session, project_id: str) -> Project:
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"No such project: {project_id}", param="project_id")
    return project


def _alert(session: Session, project_id: str, alert_id: str) -> SpendAlert:
    alert = session.get(SpendAlert, alert_id)
    if alert is None or alert.project_id != project_id:
        raise NotFound(f"No such spend alert: {alert_id}", param="alert_id")
    return alert
