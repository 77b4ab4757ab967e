"""Rounds: from a labeling project's judgements to a model in use, or to a reason why not.

    training_reward (ppo) -> training -> sampling -> comparing -> promoted | rejected
                     any of them -> failed | cancelled

`start` freezes the export and holds some prompts out. `advance` looks at what a round waits for and
does the next thing; it can be called at any time by anybody, and what was made before a crash is
found again by the name of the round that it carries. Answers of both models to the prompts held out
become a blind pairwise project; once all of it is judged, the rule decides. The policy job of a
round publishes its model, but does not put it into use: the round does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from data import audit, jobs, registry, webhooks
from data.db import Database
from data.errors import (
    InvalidInput,
    ModelNotFound,
    NotFound,
    StateConflict,
)
from data.feedback import export
from data.feedback.round_rules import Rule, hold_out, wrong
from data.files import FileStore
from data.job_methods import REWARD_MODEL
from data.job_spec import JobSpec
from data.tables import AdapterVersion, Alias, Job, Project, new_id, now
from data.tables_feedback import LabelRound

METHODS = ("dpo", "ppo")
FINAL = ("promoted", "rejected", "failed", "cancelled")
MARK = "round"  # of jobs and projects, by which a round finds its own


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """What a round is made of.

    Attributes:
        model: The base, or an own model or alias, to start from and to compare with.
        suffix: Of the new model's name where `model` is the base; an own model keeps its alias.
        comparisons: Prompts held out for the comparison, at most a quarter of all.
        hyperparameters: Of the jobs, by method: `reward_model`, and `dpo` or `ppo`.
    """

    label_project_id: str
    model: str
    method: str = "dpo"
    suffix: str | None = None
    comparisons: int = 50
    rule: Rule = field(default_factory=Rule)
    hyperparameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidInput."""
        if self.method not in METHODS:
            raise wrong("method", self.method, " or ".join(METHODS))
        if not 1 <= self.comparisons <= 1000:
            raise wrong("comparisons", self.comparisons, "1 to 1000")
        unknown = self.hyperparameters.keys() - {REWARD_MODEL, self.method}
        if unknown:
            raise InvalidInput(
                f"Unknown parameter: 'hyperparameters.{min(unknown)}'; this round has jobs of "
                f"{', '.join(methods(self.method))}.",
                param="hyperparameters",
            )
        self.rule.check()


def start(
    database: Database,
    files: FileStore,
    project_id: str,
    spec: RoundSpec,
    base_models: Sequence[str],
) -> LabelRound:
    """Freeze a project's judgements and begin a round.

    Raises:
        NotFound: No such project.
        InvalidInput: It holds no comparisons, or too few; there is no such model.
    """
    spec.check()
    model, base, suffix = _model(database, project_id, spec, base_models)
    made = LabelRound(
        id=new_id("round-"),
        project_id=project_id,
        label_project_id=spec.label_project_id,
        method=spec.method,
        status="training_reward" if spec.method == "ppo" else "training",
        model=model,
        suffix=suffix,
        rule=asdict(spec.rule),
        options={"hyperparameters": dict(spec.hyperparameters), "seed": spec.seed, "base": base},
    )
    for method in methods(spec.method):  # what the jobs would refuse is refused now
        job_spec(made, method, "checked").resolved_hyperparameters()
    frozen = export.freeze(database, files, project_id, spec.label_project_id, "preference")
    with files.open(project_id, frozen.id) as stream:
        exported = [json.loads(line) for line in stream]
    made.prompts, kept = hold_out(exported, spec.comparisons, spec.seed)
    name = f"{spec.label_project_id}-round.jsonl"
    training = files.create(project_id, export.lines(kept), name, "fine-tune")
    made.file_id, made.training_file = frozen.id, training.id
    with database.write() as session:
        session.add(made)
        audit.record(
            session, "label_round.started", made.id, project_id, method=spec.method, model=model
        )
    return made


def get(database: Database, project_id: str, round_id: str) -> LabelRound:
    """Return one; raises NotFound."""
    with database.read() as session:
        return find(session, project_id, round_id)


def describe(found: LabelRound) -> dict[str, Any]:
    """Return a round as the API tells it."""
    names = ("id", "created_at", "changed_at", "label_project_id", "method", "model", "suffix")
    more = ("status", "file_id", "training_file", "reward_job_id", "policy_job_id", "candidate")
    last = ("comparison_id", "rule", "decision", "error")
    told = {name: getattr(found, name) for name in (*names, *more, *last)}
    return {"object": "label_round", **told, "comparisons": len(found.prompts)}


def list_all(
    database: Database, project_id: str, label_project_id: str | None = None
) -> list[LabelRound]:
    """Return the account's rounds, newest first, or those of one labeling project."""
    query = select(LabelRound).where(LabelRound.project_id == project_id)
    if label_project_id is not None:
        query = query.where(LabelRound.label_project_id == label_project_id)
    with database.read() as session:
        order = (LabelRound.created_at.desc(), LabelRound.id)
        return list(session.scalars(query.order_by(*order)))


def improvable(database: Database, project_id: str) -> list[str]:
    """Return the account's aliases that a round can start from: not those of reward models."""
    with database.read() as session:
        query = (
            select(Alias.name, AdapterVersion.lineage)
            .join(AdapterVersion, AdapterVersion.id == Alias.version_id)
            .where(Alias.project_id == project_id, AdapterVersion.deleted_at.is_(None))
            .order_by(Alias.name)
        )
        found = session.execute(query).all()
    return [name for name, lineage in found if lineage.get("kind") != REWARD_MODEL]


def under_way(database: Database) -> list[LabelRound]:
    """Return the rounds that have not ended, oldest first; accounts that are closed wait."""
    closed = select(Project.id).where(Project.status != "active")
    query = select(LabelRound).where(
        LabelRound.status.not_in(FINAL), LabelRound.project_id.not_in(closed)
    )
    with database.read() as session:
        return list(session.scalars(query.order_by(LabelRound.created_at)))


def cancel(database: Database, project_id: str, round_id: str) -> LabelRound:
    """End a round, and its job if one is under way.

    Raises:
        NotFound: No such round.
        StateConflict: It has ended.
    """
    found = get(database, project_id, round_id)
    if not move(database, found, "cancelled"):
        raise StateConflict(f"{round_id} has ended already.", param="round_id")
    for method in methods(found.method):
        job = job_of(database, found, method)
        if job is not None and job.status not in jobs.FINAL:
            jobs.request_cancel(database, project_id, job.id)
    return get(database, project_id, round_id)


def _model(
    database: Database, project_id: str, spec: RoundSpec, base_models: Sequence[str]
) -> tuple[str, str, str]:
    """Return the version to start from, or the base; its base; the suffix of what comes of it."""
    if spec.model in base_models:
        return spec.model, spec.model, spec.suffix or registry.DEFAULT_SUFFIX
    with database.read() as session:
        try:
            version = registry.find_own(session, project_id, spec.model)
        except ModelNotFound as error:
            raise InvalidInput(
                f"The model `{spec.model}` cannot be improved here. Available: "
                f"{', '.join(f'`{name}`' for name in base_models)}, and your own models.",
                param="model",
                code="model_not_available",
            ) from error
    if version.lineage.get("kind") == REWARD_MODEL:
        raise InvalidInput(f"`{spec.model}` is a reward model: it answers nothing.", param="model")
    suffix = registry.alias_of(version.name).rpartition(":")[2]
    if spec.suffix not in (None, suffix):
        raise InvalidInput(
            f"Invalid 'suffix': '{spec.suffix}'; the new model takes the place of `{spec.model}`, "
            f"so its suffix is '{suffix}'. Leave it out.",
            param="suffix",
        )
    return version.name, version.base_model, suffix


def job_spec(found: LabelRound, method: str, judge: str | None) -> JobSpec:
    section: dict[str, Any] = {"hyperparameters": found.options["hyperparameters"].get(method, {})}
    if method == "ppo":
        section["grader"] = {"type": "score_model", "name": "judge", "model": judge}
    is_judge = method == REWARD_MODEL
    return JobSpec(
        model=found.options["base"] if is_judge else found.model,
        training_file=found.training_file,
        method={"type": method, method: section},
        suffix=f"{found.suffix}-judge"[-64:] if is_judge else found.suffix,
        seed=found.options["seed"],
        metadata={MARK: found.id},
    )


def job_of(database: Database, found: LabelRound, method: str) -> Job | None:
    """Return the round's job of a method, also one that it did not note before a crash."""
    mine, _ = jobs.list_jobs(database, found.project_id, 10, metadata={MARK: found.id})
    return next((job for job in mine if job.method["type"] == method), None)


def move(database: Database, found: LabelRound, status: str, **fields: Any) -> bool:
    """Change a round if nobody else did meanwhile; tells whether it was changed."""
    with database.write() as session:
        where = (LabelRound.id == found.id, LabelRound.status == found.status)
        if found.status in FINAL:
            return False
        values = {"status": status, "changed_at": now(), **fields}
        done = session.execute(update(LabelRound).where(*where).values(**values))
        changed = bool(done.rowcount)  # type: ignore[attr-defined]
        if changed and status in FINAL:
            tell(session, found, status)
    return changed


def tell(session: Session, found: LabelRound, status: str) -> None:
    """Note in the audit log, and tell the account's webhooks, how a round ended."""
    audit.record(session, f"label_round.{status}", found.id, found.project_id)
    data = {"id": found.id}
    webhooks.enqueue(session, found.project_id, f"label_round.{status}", now(), data)


def find(session: Session, project_id: str, round_id: str) -> LabelRound:
    found = session.get(LabelRound, round_id)
    if found is None or found.project_id != project_id:
        raise NotFound(f"No such round: {round_id}", param="round_id")
    return found


def methods(method: str) -> tuple[str, ...]:
    return (REWARD_MODEL, "ppo") if method == "ppo" else (method,)
