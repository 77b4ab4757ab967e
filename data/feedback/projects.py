"""Labeling projects: tasks of one kind, how often each is judged, and what pauses a labeler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback.label_kinds import check_kind, check_label
from data.tables import new_id
from data.tables_feedback import LabelGuidelines, LabelProject

MAX_GUIDELINES = 100_000
STATES = {"open": ("paused", "closed"), "paused": ("open", "closed"), "closed": ("open",)}


@dataclass(frozen=True, slots=True)
class Gates:
    """What pauses a labeler; None does not. Judgements are taken back then, never deleted.

    Attributes:
        min_gold_accuracy: Of gold tasks, once `min_gold` of them were judged.
        min_seconds: Median time of a judgement, once there are ten.
        max_side_share: Of choices for what was shown first, once there are twenty.
        max_skip_share: Of tasks, once there are twenty.
    """

    min_gold_accuracy: float | None = None
    min_gold: int = 5
    min_seconds: float | None = None
    max_side_share: float | None = None
    max_skip_share: float | None = None

    def check(self) -> None:
        """Raises InvalidInput."""
        for name in ("min_gold_accuracy", "max_side_share", "max_skip_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise _wrong(f"gates.{name}", value, "0 to 1")
        if not 1 <= self.min_gold <= 1000:
            raise _wrong("gates.min_gold", self.min_gold, "1 to 1000")
        if self.min_seconds is not None and not 0 <= self.min_seconds <= 3600:
            raise _wrong("gates.min_seconds", self.min_seconds, "0 to 3600")


@dataclass(frozen=True, slots=True)
class ProjectSpec:
    """What a labeling project is made of; `check` raises InvalidInput naming the field.

    Attributes:
        label: Settings of the kind (`label_kinds.check_label`).
        overlap: Judgements of a task that gets several.
        overlap_share: Of the tasks; the others get one.
        gold_rate: Share of tasks given out whose right answer is known.
        training_tasks: Gold tasks that every labeler does first, with the answer shown.
        seed: Of the orders in which candidates are shown, and of who gets gold when.
    """

    name: str
    kind: str
    label: Mapping[str, Any] = field(default_factory=dict)
    guidelines: str = ""
    overlap: int = 1
    overlap_share: float = 1.0
    gold_rate: float = 0.0
    training_tasks: int = 0
    lease_minutes: int = 30
    seed: int = 0
    gates: Gates = Gates()

    def check(self) -> dict[str, Any]:
        """Return the settings of the kind, with its defaults."""
        if not 0 < len(self.name) <= 128:
            raise _wrong("name", self.name[:40], "1 to 128 characters")
        for name, low, high in (
            ("overlap", 1, 100),
            ("overlap_share", 0, 1),
            ("gold_rate", 0, 0.5),
            ("training_tasks", 0, 100),
            ("lease_minutes", 1, 24 * 60),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise _wrong(name, value, f"{low} to {high}")
        _check_guidelines(self.guidelines)
        self.gates.check()
        return check_label(check_kind(self.kind), self.label)


def create(database: Database, project_id: str, spec: ProjectSpec) -> LabelProject:
    """Make a labeling project of an account; raises InvalidInput."""
    label = spec.check()
    made = LabelProject(
        id=new_id("lproj-"),
        project_id=project_id,
        name=spec.name,
        kind=spec.kind,
        label=label,
        gates=asdict(spec.gates),
        overlap=spec.overlap,
        overlap_share=spec.overlap_share,
        gold_rate=spec.gold_rate,
        training_tasks=spec.training_tasks,
        lease_minutes=spec.lease_minutes,
        seed=spec.seed,
    )
    with database.write() as session:
        session.add(made)
        session.flush()
        session.add(LabelGuidelines(label_project_id=made.id, version=1, text=spec.guidelines))
        audit.record(session, "label_project.created", made.id, project_id, name=spec.name)
    return made


def get(database: Database, project_id: str, label_project_id: str) -> LabelProject:
    """Return one; raises NotFound."""
    with database.read() as session:
        return find(session, project_id, label_project_id)


def list_all(database: Database, project_id: str) -> list[LabelProject]:
    """Return the account's labeling projects, newest first."""
    query = select(LabelProject).where(LabelProject.project_id == project_id)
    order = (LabelProject.created_at.desc(), LabelProject.id)
    with database.read() as session:
        return list(session.scalars(query.order_by(*order)))


def update_guidelines(database: Database, project_id: str, label_project_id: str, text: str) -> int:
    """Add a version of the guidelines, which is told from now on; returns its number."""
    _check_guidelines(text)
    with database.write() as session:
        found = find(session, project_id, label_project_id)
        found.guidelines_version += 1
        version = found.guidelines_version
        session.add(LabelGuidelines(label_project_id=found.id, version=version, text=text))
        audit.record(session, "label_guidelines.added", found.id, project_id, version=version)
    return version


def guidelines(
    database: Database, project_id: str, label_project_id: str, version: int | None = None
) -> tuple[int, str]:
    """Return a version of the guidelines, by default the newest; raises NotFound."""
    with database.read() as session:
        found = find(session, project_id, label_project_id)
        wanted = found.guidelines_version if version is None else version
        text = session.get(LabelGuidelines, (found.id, wanted))
        if text is None:
            raise NotFound(f"{label_project_id} has no guidelines of version {wanted}.")
        return wanted, text.text


def set_status(
    database: Database, project_id: str, label_project_id: str, status: str
) -> LabelProject:
    """Open, pause or close a project.

    Raises:
        InvalidInput: No such state.
        StateConflict: It is in that state.
    """
    if status not in STATES:
        raise _wrong("status", status, ", ".join(STATES))
    with database.write() as session:
        found = find(session, project_id, label_project_id)
        if status == found.status:
            raise StateConflict(f"{label_project_id} is {status} already.")
        found.status = status
        audit.record(session, f"label_project.{status}", found.id, project_id)
    return found


def pause(database: Database, project_id: str, label_project_id: str) -> LabelProject:
    """Give out no tasks until it is resumed; what is in hand may be finished."""
    return set_status(database, project_id, label_project_id, "paused")


def resume(database: Database, project_id: str, label_project_id: str) -> LabelProject:
    """Give out tasks again."""
    return set_status(database, project_id, label_project_id, "open")


def close(database: Database, project_id: str, label_project_id: str) -> LabelProject:
    """End it; it can be opened again."""
    return set_status(database, project_id, label_project_id, "closed")


def find(session: Session, project_id: str, label_project_id: str) -> LabelProject:
    """Return one within a transaction; another account's is as absent."""
    found = session.get(LabelProject, label_project_id)
    if found is None or found.project_id != project_id:
        raise NotFound(f"No such labeling project: {label_project_id}", param="label_project_id")
    return found


def _check_guidelines(text: str) -> None:
    if len(text) > MAX_GUIDELINES:
        raise _wrong("guidelines", f"{len(text)} characters", f"at most {MAX_GUIDELINES}")


def _wrong(name: str, value: Any, wanted: str) -> InvalidInput:
    return InvalidInput(f"Invalid '{name}': {value!r}; expected {wanted}.", param=name)
