"""The registry of adapters: versions that never change, and aliases that move between them.

A version is published by staging its folder (`adapter_folders`) and inserting its row. Promoting
moves the account's alias, and every move is kept, which is what rollback reads.

Names: a version is `ft:BASE:ACCOUNT:SUFFIX:8chars`, its alias the same without the last part. A
checkpoint of a job has its job's name and `:ckpt-step-N`. A version that another account shared is
found by its full name; only its owner can move, delete or train on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import adapter_folders, audit
from data.adapter_checks import CONFIG, ORIGIN, check_adapter
from data.db import Database
from data.errors import AdapterRefused, ModelNotFound, StateConflict
from data.tables import AdapterVersion, Alias, AliasMove, Project, new_id, now
from data.tables_jobs import CheckpointPermission

DEFAULT_SUFFIX = "default"
SCORES = "SEQ_CLS"  # what PEFT calls a model with a score head
CHECKPOINT = re.compile(r":ckpt-step-\d+$")


def record(
    session: Session,
    project: Project,
    staged: adapter_folders.StagedAdapter,
    base_model: str,
    base_fingerprint: str,
    *,
    suffix: str | None = None,
    job_id: str | None = None,
    lineage: Mapping[str, Any] | None = None,
    mark: str | None = None,
    step: int | None = None,
) -> AdapterVersion:
    """Insert the row of a staged adapter, inside the caller's transaction.

    Args:
        mark: The eight characters of the version's name; drawn if not given.
        step: Makes it a checkpoint of that step.
    """
    name = f"{alias_name(base_model, project.slug, suffix)}:{mark or new_id('', 8)}"
    if step is not None:
        name += f":ckpt-step-{step}"
    version = AdapterVersion(
        id=staged.id,
        project_id=project.id,
        name=name,
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        digest=staged.facts.digest,
        path=staged.path,
        bytes=staged.facts.bytes,
        rank=staged.facts.rank,
        target_modules=list(staged.facts.target_modules),
        job_id=job_id,
        lineage=dict(lineage or {}),
    )
    session.add(version)
    session.flush()
    return version


def publish(
    database: Database,
    adapters_dir: Path,
    project: Project,
    source: Path,
    base_model: str,
    base_fingerprint: str,
    *,
    suffix: str | None = None,
    lineage: Mapping[str, Any] | None = None,
    promoted: bool = True,
) -> AdapterVersion:
    """Stage, check and record an adapter, and point its alias at it if it is `promoted`.

    Raises:
        AdapterRefused: It failed a check.
    """
    staged = adapter_folders.stage(adapters_dir, source, base_fingerprint)
    with database.write() as session:
        version = record(
            session, project, staged, base_model, base_fingerprint, suffix=suffix, lineage=lineage
        )
        if promoted:
            point_alias(session, version)
    return version


def publish_imported(
    database: Database,
    adapters_dir: Path,
    project_id: str,
    source: Path,
    base: tuple[str, str],
    suffix: str | None,
    try_out: Callable[[str], object],
) -> AdapterVersion:
    """Publish an adapter that was trained elsewhere, on what its owner says is this base.

    Args:
        base: Name and fingerprint of the base; noted in the folder.
        try_out: Called with the digest before anything is recorded; raises if it does not work.

    Raises:
        AdapterRefused: It failed a check; nothing is left behind.
    """
    name, fingerprint = base
    origin = {"base_model": name, "base_fingerprint": fingerprint}
    (source / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
    with database.read() as session:
        project = session.get_one(Project, project_id)
    digest = check_adapter(source, fingerprint).digest
    if json.loads((source / CONFIG).read_bytes()).get("task_type") == SCORES:
        raise AdapterRefused(
            f"{source / CONFIG}: task_type is {SCORES!r}, a model that scores; only those "
            "that write (CAUSAL_LM) can be brought. Train a reward model here, from comparisons: a "
            "fine-tuning job of the method 'reward_model'.",
            code="adapter_unsupported",
        )
    try_out(digest)
    lineage = {"imported": True}
    return publish(
        database, adapters_dir, project, source, name, fingerprint, suffix=suffix, lineage=lineage
    )


def alias_name(base_model: str, account: str, suffix: str | None) -> str:
    """Return the movable name of an account's models for one purpose."""
    return f"ft:{base_model}:{account}:{suffix or DEFAULT_SUFFIX}"


def alias_of(version_name: str) -> str:
    """Return the alias that a version's name belongs to."""
    return CHECKPOINT.sub("", version_name).rpartition(":")[0]


def owner_of(version: AdapterVersion) -> str:
    """Return the slug of the account that a version belongs to."""
    return alias_of(version.name).split(":")[-2]


def resolve(database: Database, project_id: str, name: str) -> AdapterVersion:
    """Find the version that an account may use by a version's name or an alias.

    Raises:
        ModelNotFound: There is none, or it is another account's that does not share it.
    """
    with database.read() as session:
        try:
            return find_own(session, project_id, name)
        except ModelNotFound:
            shared = session.scalar(
                select(AdapterVersion)
                .join(CheckpointPermission, CheckpointPermission.version_id == AdapterVersion.id)
                .where(
                    AdapterVersion.name == name,
                    AdapterVersion.deleted_at.is_(None),
                    CheckpointPermission.project_id == project_id,
                )
            )
            if shared is None:
                raise
            return shared


def list_versions(database: Database, project_id: str) -> list[AdapterVersion]:
    """Return an account's versions, newest first."""
    query = select(AdapterVersion).where(
        AdapterVersion.project_id == project_id, AdapterVersion.deleted_at.is_(None)
    )
    order = (AdapterVersion.created_at.desc(), AdapterVersion.id.desc())
    with database.read() as session:
        return list(session.scalars(query.order_by(*order)))


def list_aliases(database: Database, project_id: str) -> list[Alias]:
    """Return an account's aliases, by name."""
    query = select(Alias).where(Alias.project_id == project_id).order_by(Alias.name)
    with database.read() as session:
        return list(session.scalars(query))


def history(database: Database, project_id: str, alias: str) -> list[AliasMove]:
    """Return every move of an alias, oldest first."""
    with database.read() as session:
        found = _find_alias(session, project_id, alias)
        query = select(AliasMove).where(AliasMove.alias == found.name).order_by(AliasMove.seq)
        return list(session.scalars(query))


def promote(
    database: Database, project_id: str, version_name: str, alias: str | None = None
) -> Alias:
    """Point a version's alias at it, or another one of the account: the next request gets it.

    Raises:
        ModelNotFound: There is no such version or alias.
    """
    with database.write() as session:
        if alias is not None:
            _find_alias(session, project_id, alias)
        version = find_own(session, project_id, version_name)
        return point_alias(session, version, alias=alias)


def point_alias(
    session: Session, version: AdapterVersion, action: str = "promote", alias: str | None = None
) -> Alias:
    """Move the alias of a version, or another one, to it, inside the caller's transaction."""
    name = alias or alias_of(version.name)
    found = session.get(Alias, name)
    if found is None:
        found = Alias(name=name, project_id=version.project_id, version_id=version.id)
        session.add(found)
    found.version_id, found.updated_at = version.id, now()
    session.add(AliasMove(alias=name, version_id=version.id, action=action))
    session.flush()
    return found


def rollback(database: Database, project_id: str, alias: str) -> AdapterVersion:
    """Point an alias at the version that was in use before the present one.

    Rolling back twice goes back two versions: a rolled-back version is never a target itself.

    Raises:
        ModelNotFound: There is no such alias.
        StateConflict: There is no earlier version to go back to.
    """
    with database.write() as session:
        version = _previous(session, project_id, alias)
        point_alias(session, version, "rollback")
        return version


def previous(database: Database, project_id: str, alias: str) -> AdapterVersion:
    """Return the version that `rollback` would go to; raises what it would."""
    with database.read() as session:
        return _previous(session, project_id, alias)


def _previous(session: Session, project_id: str, alias: str) -> AdapterVersion:
    found = _find_alias(session, project_id, alias)
    usable = [v for v in _in_use(session, found)[:-1] if v.id != found.version_id]
    if not usable:
        raise StateConflict(
            f"The alias {alias} has no earlier version to go back to; "
            "`hone models list` shows the versions",
            param="alias",
        )
    return usable[-1]


def newest_of_base(
    database: Database, project_id: str, name: str, base_fingerprint: str
) -> AdapterVersion | None:
    """Return what an alias named last among versions of one base; None if there is none.

    While an account moves to a new base, an alias may name a version of the other one than a server
    runs: that server goes on with the version before.
    """
    with database.read() as session:
        alias = session.get(Alias, name)
        if alias is None or alias.project_id != project_id:
            return None
        found = [v for v in _in_use(session, alias) if v.base_fingerprint == base_fingerprint]
        return found[-1] if found else None


def _in_use(session: Session, alias: Alias) -> list[AdapterVersion]:
    """Return the versions that an alias named one after the other, without what was deleted.

    A rollback takes back all that came after the version that it went to.
    """
    query = select(AliasMove).where(AliasMove.alias == alias.name).order_by(AliasMove.seq)
    past: list[str] = []
    for move in session.scalars(query):
        if move.action == "rollback":
            past.pop()
            while past[-1] != move.version_id:
                past.pop()
        elif not past or past[-1] != move.version_id:
            past.append(move.version_id)
    found = [session.get_one(AdapterVersion, version_id) for version_id in past]
    return [version for version in found if version.deleted_at is None]


def delete(database: Database, project_id: str, name: str) -> AdapterVersion:
    """Take a version out of use: its alias falls away if it points at it.

    Another alias that does names again what it named before, or falls away if nothing is left.

    Raises:
        ModelNotFound: There is no such version of this account.
    """
    with database.write() as session:
        version = find_own(session, project_id, name)
        version.deleted_at = now()
        for alias in session.scalars(select(Alias).where(Alias.version_id == version.id)).all():
            before = [] if alias.name == alias_of(version.name) else _in_use(session, alias)
            if before:
                point_alias(session, before[-1], "rollback", alias.name)
            else:
                session.delete(alias)
        audit.record(session, "model.deleted", version.name, project_id)
    return version


def find_own(session: Session, project_id: str, name: str) -> AdapterVersion:
    alias = session.get(Alias, name)
    if alias is not None and alias.project_id == project_id:
        version = session.get(AdapterVersion, alias.version_id)
    else:
        version = session.scalar(select(AdapterVersion).where(AdapterVersion.name == name))
    if version is None or version.project_id != project_id or version.deleted_at is not None:
        raise ModelNotFound(name)
    return version


def _find_alias(session: Session, project_id: str, name: str) -> Alias:
    alias = session.get(Alias, name)
    if alias is None or alias.project_id != project_id:
        raise ModelNotFound(name)
    return alias
