"""Sharing one version with another account: it may use it by its full name, and no more.

The owner shares what is its own; an operator (no account) shares anything. What one may not share
answers exactly as what does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from data import audit, model_access
from data.db import Database
from data.errors import InvalidInput, ModelNotFound, NotFound
from data.registry import find_own
from data.tables import AdapterVersion, Project, new_id
from data.tables_jobs import CheckpointPermission

MAX_PROJECTS = 100


def grant(
    database: Database, owner_id: str | None, name: str, project_ids: Sequence[str]
) -> list[CheckpointPermission]:
    """Let accounts use a version; those that may already keep their permission.

    Args:
        owner_id: The account that asks; None for an operator.

    Raises:
        ModelNotFound: There is no such version, or it is not the asker's.
        InvalidInput: An account does not exist or owns the version, or there are too many.
    """
    if not 1 <= len(project_ids) <= MAX_PROJECTS:
        raise InvalidInput(
            f"Invalid 'project_ids': expected 1 to {MAX_PROJECTS} ids, but got {len(project_ids)}.",
            param="project_ids",
        )
    with database.write() as session:
        version = _find_version(session, owner_id, name)
        granted = []
        for index, project_id in enumerate(dict.fromkeys(project_ids)):
            param = f"project_ids[{index}]"
            if session.get(Project, project_id) is None:
                raise InvalidInput(f"No such project: {project_id}", param=param)
            if project_id == version.project_id:
                raise InvalidInput(f"The project {project_id} owns the model.", param=param)
            granted.append(_grant_one(session, version, project_id))
    return granted


def list_permissions(
    database: Database,
    owner_id: str | None,
    name: str,
    *,
    project_id: str | None = None,
    limit: int = 10,
    order: Literal["ascending", "descending"] = "descending",
    after: str | None = None,
) -> tuple[list[CheckpointPermission], bool]:
    """Return a page of a version's permissions by time, and whether more follow.

    Raises:
        ModelNotFound: There is no such version, or it is not the asker's.
        InvalidInput: `after` names no permission of it.
    """
    table = CheckpointPermission
    with database.read() as session:
        version = _find_version(session, owner_id, name)
        query = select(table).where(table.version_id == version.id)
        if project_id is not None:
            query = query.where(table.project_id == project_id)
        if after is not None:
            mark = session.scalar(query.where(table.id == after))
            if mark is None:
                raise InvalidInput(f"Invalid 'after': no permission {after}", param="after")
            if order == "ascending":
                later, tied = table.created_at > mark.created_at, table.id > mark.id
            else:
                later, tied = table.created_at < mark.created_at, table.id < mark.id
            query = query.where(or_(later, (table.created_at == mark.created_at) & tied))
        keys = (table.created_at, table.id)
        if order == "descending":
            query = query.order_by(*(key.desc() for key in keys))
        else:
            query = query.order_by(*keys)
        found = list(session.scalars(query.limit(limit + 1)))
    return found[:limit], len(found) > limit


def revoke(database: Database, owner_id: str | None, name: str, permission_id: str) -> None:
    """Take a permission back; it holds from the next request on.

    Raises:
        ModelNotFound: There is no such version, or it is not the asker's.
        NotFound: It has no such permission.
    """
    with database.write() as session:
        version = _find_version(session, owner_id, name)
        permission = session.get(CheckpointPermission, permission_id)
        if permission is None or permission.version_id != version.id:
            raise NotFound(f"No such checkpoint permission: {permission_id}", param="permission_id")
        told = {"model": version.name, "shared_with": permission.project_id}
        kind = "checkpoint.permission.deleted"
        audit.record(session, kind, permission_id, version.project_id, **told)
        session.delete(permission)


def _find_version(session: Session, owner_id: str | None, name: str) -> AdapterVersion:
    version = session.scalar(select(AdapterVersion).where(AdapterVersion.name == name))
    if owner_id is not None:
        found = find_own(session, owner_id, name)
        if version is None:  # an alias, which moves: what is shared must not
            raise InvalidInput(
                f"`{name}` is an alias; share the version that it stands for, `{found.name}`.",
                param="fine_tuned_model_checkpoint",
            )
        model_access.check(session, owner_id, found, name)
        return found
    if version is None or version.deleted_at is not None:
        raise ModelNotFound(name)
    return version


def _grant_one(session: Session, version: AdapterVersion, project_id: str) -> CheckpointPermission:
    table = CheckpointPermission
    same = (table.version_id == version.id) & (table.project_id == project_id)
    permission = session.scalar(select(table).where(same))
    if permission is None:
        permission = table(id=new_id("cp_"), version_id=version.id, project_id=project_id)
        session.add(permission)
        session.flush()
        told = {"model": version.name, "shared_with": project_id}
        kind = "checkpoint.permission.created"
        audit.record(session, kind, permission.id, version.project_id, **told)
    return permission
