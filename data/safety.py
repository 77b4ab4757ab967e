"""What happens after harmful use: a warning, a suspension that can be taken back, and its case.

A suspended account's calls are refused, its open streams are cut and its adapters unloaded by the
server within seconds, and its jobs are paused here. The case says why, to the account itself too.
"""

from __future__ import annotations

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from data import audit, job_pause, jobs, projects, webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.files import LIVE_JOBS
from data.tables import Job, Project, new_id, now
from data.tables_accounts import SafetyCase

MAX_REASON = 2000
MAX_MESSAGE = 4000


def warn(database: Database, project_id: str, reason: str) -> SafetyCase:
    """Open a case that changes nothing; raises NotFound or InvalidInput."""
    _check(reason)
    with database.write() as session:
        projects.find(session, project_id)
        return open_warning(session, project_id, reason)


def open_warning(session: Session, project_id: str, reason: str) -> SafetyCase:
    """Open a case that changes nothing, inside the caller's transaction."""
    case = _new_case(project_id, "warning", reason)
    session.add(case)
    audit.record(session, "account.warned", project_id, project_id, case=case.id)
    webhooks.enqueue(session, project_id, "safety.warning_issued", now(), {"id": case.id})
    return case


def suspend(database: Database, project_id: str, reason: str) -> SafetyCase:
    """Stop an account until it is reinstated; its jobs are paused.

    Raises:
        NotFound: There is no such account.
        StateConflict: It is not active.
        InvalidInput: The reason is empty or too long.
    """
    _check(reason)
    with database.write() as session:
        project = projects.find(session, project_id)
        if project.status != "active":
            raise StateConflict(f"The account {project.slug} is {project.status}.", param="id")
        case = _new_case(project_id, "deactivation", reason)
        session.add(case)
        project.status, project.case_id = "suspended", case.id
        audit.record(session, "account.suspended", project_id, project_id, case=case.id)
        webhooks.enqueue(session, project_id, "safety.deactivation_issued", now(), {"id": case.id})
        live = select(Job).where(Job.project_id == project_id, Job.status.in_(LIVE_JOBS))
        case.paused_jobs = [
            job.id for job in session.scalars(live).all() if job_pause.hold(session, job)
        ]
    return case


def reinstate(database: Database, project_id: str) -> Project:
    """Let an account go on, and the jobs that its suspension paused.

    Raises:
        NotFound: There is no such account.
        StateConflict: It is not suspended.
    """
    with database.write() as session:
        project = projects.find(session, project_id)
        if project.status != "suspended":
            raise StateConflict(f"The account {project.slug} is {project.status}.", param="id")
        case = session.get_one(SafetyCase, project.case_id)
        case.closed_at = now()
        project.status, project.case_id = "active", None
        audit.record(session, "account.reinstated", project_id, project_id, case=case.id)
        for job_id in case.paused_jobs:  # one that ended stays so
            job_pause.let_go_on(session, jobs.find(session, project_id, job_id))
    return project


def find_case(database: Database, project_id: str | None, case_id: str) -> SafetyCase:
    """Return a case of an account, or any for None; raises NotFound."""
    with database.read() as session:
        return _case_of(session, project_id, case_id)


def _case_of(session: Session, project_id: str | None, case_id: str) -> SafetyCase:
    case = session.get(SafetyCase, case_id)
    if case is None or project_id not in (None, case.project_id):
        raise NotFound(f"No such Case object: {case_id}", param="id")
    return case


def appeal(database: Database, project_id: str, case_id: str, message: str) -> SafetyCase:
    """Ask the operator to look at a case again; once, until it is answered.

    Raises:
        NotFound: The account has no such case.
        StateConflict: The case is closed, or its appeal waits for an answer.
        InvalidInput: The message is empty or too long.
    """
    _check(message, "message", MAX_MESSAGE, "Say why the case should be looked at again.")
    with database.write() as session:
        case = _case_of(session, project_id, case_id)
        if case.closed_at is not None:
            raise StateConflict(f"The case {case_id} is closed.", param="id")
        if case.appeal is not None and case.appeal["answered_at"] is None:
            raise StateConflict(f"The appeal to {case_id} waits for its answer.", param="id")
        case.appeal = {
            "message": message.strip(),
            "created_at": now(),
            "answer": None,
            "answered_at": None,
        }
        audit.record(session, "case.appealed", case_id, project_id)
    return case


def answer_appeal(database: Database, case_id: str, message: str) -> SafetyCase:
    """Answer an appeal; the account reads it. To reinstate the account is a call of its own.

    Raises:
        NotFound: There is no such case.
        StateConflict: Nothing waits for an answer.
        InvalidInput: The message is empty or too long.
    """
    _check(message, "message", MAX_MESSAGE, "The account reads it.")
    with database.write() as session:
        case = _case_of(session, None, case_id)
        if case.appeal is None or case.appeal["answered_at"] is not None:
            raise StateConflict(f"No appeal to the case {case_id} waits for an answer.", param="id")
        case.appeal = {**case.appeal, "answer": message.strip(), "answered_at": now()}
        audit.record(session, "case.answered", case_id, case.project_id)
    return case


def list_cases(
    database: Database, waiting: bool = False, limit: int | None = None, after: str | None = None
) -> tuple[list[SafetyCase], bool]:
    """Return cases, newest first, and whether more follow.

    Args:
        waiting: Only those whose appeal has no answer.
        after: Id of the case that the page follows.

    Raises:
        InvalidInput: `after` names no case.
    """
    query = select(SafetyCase).order_by(SafetyCase.created_at.desc(), SafetyCase.id.desc())
    with database.read() as session:
        if after is not None:
            last = session.get(SafetyCase, after)
            if last is None:
                raise InvalidInput(f"Invalid 'after': no case {after}", param="after")
            place = tuple_(SafetyCase.created_at, SafetyCase.id)
            query = query.where(place < (last.created_at, last.id))
        if waiting:
            made, answered = (
                SafetyCase.appeal[name].as_string() for name in ("message", "answered_at")
            )
            query = query.where(made.is_not(None), answered.is_(None))
        found = session.scalars(query.limit(None if limit is None else limit + 1)).all()
    return list(found[:limit]), limit is not None and len(found) > limit


def closed_accounts(database: Database) -> dict[str, Project]:
    """Return the accounts that may not be served, by id."""
    with database.read() as session:
        found = session.scalars(select(Project).where(Project.status != "active"))
        return {project.id: project for project in found}


def _new_case(project_id: str, notice: str, reason: str) -> SafetyCase:
    return SafetyCase(
        id=new_id("case_"),
        project_id=project_id,
        notice=notice,
        reason=reason.strip(),
        paused_jobs=[],
        created_at=now(),
    )


def _check(
    text: str, name: str = "reason", most: int = MAX_REASON, hint: str = "The account reads it."
) -> None:
    if not 0 < len(text.strip()) <= most:
        raise InvalidInput(
            f"Invalid '{name}': expected 1 to {most} characters, but got {len(text.strip())}. "
            f"{hint}",
            param=name,
        )
