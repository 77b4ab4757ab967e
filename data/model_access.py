"""Which models an account may use: a list of those allowed, or of those denied.

An entry stands for all that lies below it: a base for every fine-tune of it, an alias for its
versions. A model that is not permitted is answered exactly as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy.orm import Session

from data import audit, projects, registry
from data.db import Database
from data.errors import InvalidInput, ModelNotFound
from data.model_rules import ModelRules
from data.tables import AdapterVersion, now
from data.tables_accounts import ModelPermission

Mode = Literal["allow_list", "deny_list"]
MAX_ENTRIES = 1000


def permits(database: Database, project_id: str, name: str, base_model: str | None = None) -> bool:
    """Tell whether an account may use a model; give the base of a fine-tune."""
    with database.read() as session:
        return rules_in(session, project_id).permits(name, base_model)


def rules_of(database: Database, project_id: str) -> ModelRules:
    """Return an account's list as rules."""
    with database.read() as session:
        return rules_in(session, project_id)


def rules_in(session: Session, project_id: str) -> ModelRules:
    """Return an account's list as rules, inside the caller's transaction."""
    row = session.get(ModelPermission, project_id)
    return ModelRules() if row is None else ModelRules(row.mode, tuple(row.model_ids))


def find_version(
    database: Database, project_id: str, name: str, *, own: bool = True
) -> AdapterVersion:
    """Return the version that a name or alias stands for, if the account may use it.

    Args:
        own: Only of the account's; else also one that another account shares with it.

    Raises:
        ModelNotFound: There is none, it is another account's, or the account may not use it.
    """
    with database.read() as session:
        if own:
            version = registry.find_own(session, project_id, name)
        else:
            version = registry.resolve(database, project_id, name)
        check(session, project_id, version, name)
    return version


def check(session: Session, project_id: str, version: AdapterVersion, name: str) -> None:
    """Raise ModelNotFound, with the name asked for, unless an account may use a version."""
    if not rules_in(session, project_id).permits(version.name, version.base_model):
        raise ModelNotFound(name)


def get(database: Database, project_id: str) -> ModelPermission:
    """Return an account's list; without one, an empty list of denied models. Raises NotFound."""
    with database.read() as session:
        projects.find(session, project_id)
        row = session.get(ModelPermission, project_id)
    return row or ModelPermission(project_id=project_id, mode="deny_list", model_ids=[])


def replace(
    database: Database, project_id: str, mode: Mode, model_ids: Sequence[str]
) -> ModelPermission:
    """Set an account's list; raises NotFound or InvalidInput."""
    with database.write() as session:
        projects.find(session, project_id)
        return put(session, project_id, mode, model_ids)


def put(session: Session, project_id: str, mode: Mode, model_ids: Sequence[str]) -> ModelPermission:
    """Set an account's list in a transaction; raises InvalidInput."""
    if len(model_ids) > MAX_ENTRIES:
        raise InvalidInput(
            f"Invalid 'model_ids': {len(model_ids)} entries; at most {MAX_ENTRIES} are kept.",
            param="model_ids",
        )
    row = session.get(ModelPermission, project_id)
    if row is None:
        row = ModelPermission(project_id=project_id)
        session.add(row)
    row.mode, row.model_ids, row.updated_at = mode, list(dict.fromkeys(model_ids)), now()
    details = {"mode": mode, "model_ids": row.model_ids}
    audit.record(session, "model_permissions.updated", project_id, project_id, **details)
    return row


def clear(database: Database, project_id: str) -> None:
    """Remove an account's list; raises NotFound for an unknown account."""
    with database.write() as session:
        projects.find(session, project_id)
        row = session.get(ModelPermission, project_id)
        if row is not None:
            session.delete(row)
            audit.record(session, "model_permissions.deleted", project_id, project_id)
