"""Moving an account's models to a new base: which recipes can be run again, and what became of it.

A recipe is what lineage keeps of the version that an alias names: the job that made it, with its
files. An upgrade is an ordinary job on the new base that knows the version it replaces; the worker
trains it, compares both on the same rows, and moves the aliases where the rule allows (see
`follow`). What was done is read from jobs and aliases alone, so asking again goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import jobs, registry
from data.db import Database
from data.errors import InvalidInput, StateConflict
from data.feedback.rounds import MARK
from data.job_spec import JobSpec
from data.job_start import check_file
from data.settings import Limits
from data.tables import AdapterVersion, Alias, Job, Project

UPGRADE = "upgrade"  # of a job's options
UPGRADED_FROM = "upgraded_from"  # of a version's lineage
HELD_OUT = 0.1  # of the training rows, for a recipe without a validation file
Standing = Literal["due", "running", "promoted", "refused", "rolled_back", "skipped"]


@dataclass(frozen=True)
class Bases:
    """The bases of an upgrade: their names, and by what the worker finds them."""

    old: str
    new: str
    old_source: str
    new_source: str


@dataclass
class Recipe:
    """One version on the old base, and the aliases that name it.

    Attributes:
        aliases, moved: Aliases that name it, and those that name the version on the new base now.
        rows: On which both are compared.
        standing: `due` (no job yet, the last one failed, or its model was deleted), `running`,
            `promoted`, `refused` by the comparison, `rolled_back`, or `skipped`.
        reason: Why it is skipped or was refused.
        job_id: Of the upgrade.
        candidate: The version on the new base.
    """

    project_id: str
    account: str
    version_id: str
    version: str
    aliases: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    rows: str = ""
    standing: Standing = "due"
    reason: str = ""
    job_id: str | None = None
    candidate: str | None = None
    source: Job | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        names = (
            *("account", "version", "aliases", "moved", "standing", "reason", "rows"),
            *("job_id", "candidate"),
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Undone:
    """What became of an upgraded alias: the version that it names again, or why it could not."""

    alias: str
    version: str | None
    problem: str = ""


def plan(database: Database, project: Project, bases: Bases) -> list[Recipe]:
    """Return an account's recipes on the old base, and those already moved from it."""
    found: dict[str, Recipe] = {}
    with database.read() as session:
        query = select(Alias).where(Alias.project_id == project.id).order_by(Alias.name)
        for alias in session.scalars(query):
            version = session.get_one(AdapterVersion, alias.version_id)
            old = _replaced(session, version, bases)
            if version.base_model == bases.old and version.deleted_at is None:
                _of(found, project, version).aliases.append(alias.name)
            elif old is not None and alias.name != registry.alias_of(version.name):
                recipe = _of(found, project, old)
                recipe.moved.append(alias.name)
                recipe.candidate = version.name
        upgrades = _upgrades(session, project, bases)
        for recipe in found.values():
            if recipe.aliases:
                _judge(session, recipe, upgrades.get(recipe.version_id))
            else:
                recipe.standing = "promoted"
    return list(found.values())


def start(database: Database, recipe: Recipe, bases: Bases, limits: Limits | None = None) -> Job:
    """Queue the job of a recipe that is due.

    Raises:
        QuotaExceeded: The account has as many jobs as it may have at a time.
        InvalidInput: A file went in the meantime.
    """
    job = recipe.source
    if recipe.standing != "due" or job is None:
        raise InvalidInput(f"{recipe.version} is {recipe.standing}, so it is not started")
    upgrade: dict[str, Any] = {
        "version": recipe.version_id,
        "old_base": bases.old_source,
        "new_base": bases.new_source,
    }
    if job.validation_file is None:
        upgrade["held_out"] = HELD_OUT
    spec = JobSpec(
        model=bases.new,
        training_file=job.training_file,
        validation_file=job.validation_file,
        method=job.method,
        suffix=job.suffix,
        seed=job.seed,
        metadata={name: text for name, text in (job.metadata_ or {}).items() if name != MARK},
        integrations=tuple(job.integrations),
        options={name: value for name, value in job.options.items() if name != UPGRADE},
    )
    made = jobs.create(database, recipe.project_id, spec, [bases.new], limits, upgrade)
    recipe.standing, recipe.job_id = "running", made.id
    return made


def follow(session: Session, job: Job, version: AdapterVersion) -> Sequence[str]:
    """Move the aliases that still name the version that a job replaces; returns their names.

    Does nothing for a job that is no upgrade.
    """
    if UPGRADE not in job.options:
        return []
    query = select(Alias).where(
        Alias.project_id == job.project_id, Alias.version_id == job.options[UPGRADE]["version"]
    )
    moved = [alias.name for alias in session.scalars(query.order_by(Alias.name))]
    for name in moved:
        registry.point_alias(session, version, "upgrade", name)
    return moved


def undo(database: Database, project: Project, bases: Bases, dry_run: bool = False) -> list[Undone]:
    """Move an account's upgraded aliases back to the old base, or with `dry_run` tell which.

    An alias that cannot go back stops no other; its problem is told.
    """
    move = registry.previous if dry_run else registry.rollback
    found = []
    for recipe in plan(database, project, bases):
        for alias in recipe.moved:
            try:
                found.append(Undone(alias, move(database, project.id, alias).name))
            except StateConflict as error:
                found.append(Undone(alias, None, error.message))
    return found


def _replaced(session: Session, version: AdapterVersion, bases: Bases) -> AdapterVersion | None:
    """Return the version that an upgraded one took the place of; None if it is no such one."""
    if version.base_model != bases.new or UPGRADED_FROM not in version.lineage:
        return None
    old = session.get(AdapterVersion, version.lineage[UPGRADED_FROM])
    return old if old is not None and old.base_model == bases.old else None


def _of(found: dict[str, Recipe], project: Project, version: AdapterVersion) -> Recipe:
    new = Recipe(project.id, project.slug, version.id, version.name)
    return found.setdefault(version.id, new)


def _upgrades(session: Session, project: Project, bases: Bases) -> dict[str, Job]:
    """Return of each version the job that upgrades it: the newest, of those that did not fail.

    A job whose model was deleted does not count.
    """
    gone = select(AdapterVersion.job_id).where(
        AdapterVersion.name == Job.fine_tuned_model, AdapterVersion.deleted_at.is_not(None)
    )
    query = select(Job).where(Job.project_id == project.id, ~gone.exists())
    found = [
        job for job in session.scalars(query) if UPGRADE in job.options and job.base == bases.new
    ]
    found.sort(key=lambda job: (job.status not in ("failed", "cancelled"), job.created_at))
    return {job.options[UPGRADE]["version"]: job for job in found}


def _judge(session: Session, recipe: Recipe, upgrade: Job | None) -> None:
    """Fill in where a recipe stands, of which an alias still names the old version."""
    if upgrade is not None:
        recipe.job_id = upgrade.id
        if upgrade.status not in jobs.FINAL:
            recipe.standing = "running"
            return
        name = AdapterVersion.name == upgrade.fine_tuned_model
        made = session.scalar(select(AdapterVersion).where(name))
        if made is not None:
            gate = made.lineage.get("gate") or made.lineage.get("result", {}).get("gate") or {}
            recipe.candidate = made.name
            recipe.standing = "refused" if not gate.get("promote", True) else "rolled_back"
            recipe.reason = "; ".join(gate.get("reasons", []))
            return
    version = session.get_one(AdapterVersion, recipe.version_id)
    source = session.get(Job, version.job_id) if version.job_id else None
    problem = _problem(session, version, source)
    if problem is not None or source is None:
        recipe.standing, recipe.reason = "skipped", problem or ""
        return
    recipe.source = source
    if source.validation_file is not None:
        recipe.rows = f"validation file {source.validation_file}"
    else:
        recipe.rows = f"{HELD_OUT:.0%} of {source.training_file}, which the old version learned"
    if upgrade is not None:
        told = (upgrade.error or {}).get("message", upgrade.status)
        recipe.reason = f"the last try, {upgrade.id}, ended so: {told}"


def _problem(session: Session, version: AdapterVersion, source: Job | None) -> str | None:
    """Return why a version's recipe cannot be run again, or None."""
    if source is None and "resolved" in version.lineage:
        return "no job made it, but `hone tune`; tune on the new base, and publish that"
    if source is None:
        return "it was imported, so nothing says how it was trained"
    kind = source.method["type"]
    if kind != "supervised":
        return f"the method {kind} is not run again; train it on the new base's version"
    if source.start_version_id is not None:
        return "its job went on from another adapter, which the new base does not have"
    for name in ("training_file", "validation_file"):
        file_id = getattr(source, name)
        if file_id is not None:
            try:
                check_file(session, version.project_id, name, file_id)
            except InvalidInput:
                return f"its {name.replace('_', ' ')} {file_id} is gone"
    return None
