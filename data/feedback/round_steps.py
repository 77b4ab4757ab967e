"""What a round does next; see `data.feedback.rounds`."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import update
from sqlalchemy.orm import Session

from data import jobs, registry
from data.db import Database
from data.errors import NotFound, QuotaExceeded, ToolkitError
from data.feedback import projects, reports, rounds, tasks
from data.feedback.projects import ProjectSpec
from data.feedback.round_rules import Rule, points, verdict
from data.feedback.rounds import MARK
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.job_methods import REWARD_MODEL
from data.settings import Limits
from data.tables import Job, now
from data.tables_feedback import LabelRound


def advance(
    database: Database, found: LabelRound, base_models: Sequence[str], limits: Limits
) -> None:
    """Do what is next, if what the round waits for has come; sampling is done by the server."""
    try:
        if found.status == "training_reward":
            _train(database, found, REWARD_MODEL, "training", base_models, limits)
        elif found.status == "training":
            _train(database, found, found.method, "sampling", base_models, limits)
        elif found.status == "comparing":
            _decide(database, found)
    except ToolkitError as error:
        fail(database, found, error.public)


def fail(database: Database, found: LabelRound, why: str) -> None:
    """End a round that cannot go on."""
    rounds.move(database, found, "failed", error=why)


def lease(database: Database, found: LabelRound, seconds: int) -> bool:
    """Take the sampling of a round into one server's hands; 0 s gives it back."""
    with database.write() as session:
        where = [LabelRound.id == found.id, LabelRound.status == found.status]
        if seconds:
            where.append(LabelRound.leased_until < now())
        values = {"leased_until": now() + seconds if seconds else 0}
        done = session.execute(update(LabelRound).where(*where).values(**values))
        return bool(done.rowcount)  # type: ignore[attr-defined]


def compare(database: Database, found: LabelRound, old: Sequence[str], new: Sequence[str]) -> None:
    """Make the blind project of both models' answers to the prompts held out, in their order."""
    name = f"{found.id}: new against old"
    given = [
        TaskSpec(prompt, [CandidateSpec(a, found.model), CandidateSpec(b, found.candidate)])
        for prompt, a, b in zip(found.prompts, old, new, strict=True)
        if a != b
    ]
    same = len(found.prompts) - len(given)
    if not given:
        told = {"reasons": ["both models gave the same answers"], "same": same}
        rounds.move(database, found, "rejected", decision=told)
        return
    mine = [p for p in projects.list_all(database, found.project_id) if p.name == name]
    if not mine:  # else a server died between this and what follows
        source = projects.get(database, found.project_id, found.label_project_id)
        version, text = projects.guidelines(database, found.project_id, source.id)
        spec = ProjectSpec(name, "pairwise", guidelines=text, seed=found.options["seed"] + version)
        mine = [projects.create(database, found.project_id, spec)]
    if not mine[0].tasks_added:
        tasks.add(database, found.project_id, mine[0].id, given)
    rounds.move(database, found, "comparing", comparison_id=mine[0].id, decision={"same": same})


def decides(session: Session, job: Job) -> LabelRound | None:
    """Return the round that decides about a job's model, if one does."""
    round_id = (job.metadata_ or {}).get(MARK)
    found = session.get(LabelRound, round_id) if round_id else None
    if found is None or found.project_id != job.project_id:
        return None
    return found if job.method["type"] == found.method else None


def _train(
    database: Database,
    found: LabelRound,
    method: str,
    following: str,
    base_models: Sequence[str],
    limits: Limits,
) -> None:
    """Make the job of a method, or go on to what follows once it has succeeded."""
    job = rounds.job_of(database, found, method)
    column = "reward_job_id" if method == REWARD_MODEL else "policy_job_id"
    if job is None:
        judge = _judge(database, found) if method == "ppo" else None
        spec = rounds.job_spec(found, method, judge)
        try:
            job = jobs.create(database, found.project_id, spec, base_models, limits)
        except QuotaExceeded:
            return  # the account has as many jobs under way as it may have; tried again
        rounds.move(database, found, found.status, **{column: job.id})
    elif job.status == "succeeded":
        more = {} if method == REWARD_MODEL else {"candidate": job.fine_tuned_model}
        rounds.move(database, found, following, **{column: job.id}, **more)
    elif job.status in jobs.FINAL:
        why = (job.error or {}).get("message") or f"was {job.status}"
        fail(database, found, f"The job {job.id} of the method {method}: {why}")


def _judge(database: Database, found: LabelRound) -> str:
    job = rounds.job_of(database, found, REWARD_MODEL)
    if job is None or job.fine_tuned_model is None:
        raise NotFound(f"{found.id} has no reward model.")
    return job.fine_tuned_model


def _decide(database: Database, found: LabelRound) -> None:
    """Apply the rule once all of the comparison is judged."""
    comparison = str(found.comparison_id)
    progress = reports.progress(database, found.project_id, comparison)
    if progress.wanted or progress.in_hand:
        return
    same = (found.decision or {}).get("same", 0)
    decision = verdict(Rule(**found.rule), points(database, comparison), same)
    with database.write() as session:
        current = rounds.find(session, found.project_id, found.id)
        if current.status != "comparing":
            return
        in_use = _in_use(session, found)
        if decision["promote"] and in_use not in (None, found.model):
            told = f"the model in use is {in_use} now, with which nothing was compared"
            decision |= {"promote": False, "reasons": [told]}
        if decision["promote"]:
            version = registry.find_own(session, found.project_id, str(found.candidate))
            registry.point_alias(session, version)
        current.status = "promoted" if decision["promote"] else "rejected"
        current.decision, current.changed_at = decision, now()
        rounds.tell(session, found, current.status)


def _in_use(session: Session, found: LabelRound) -> str | None:
    """Return the version that the alias names now; None where the round starts from the base."""
    if found.model == found.options["base"]:
        return None
    return registry.find_own(session, found.project_id, registry.alias_of(found.model)).name
