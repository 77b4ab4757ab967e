"""Records of human feedback: what users said of completions, and what labelers judged.

A judgement is never rewritten: a correction is a new one that supersedes the old.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from data.tables import Record, now


class LabelProject(Record):
    """Tasks of one kind, and the rules by which they are given out."""

    __tablename__ = "label_projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    label: Mapped[dict[str, Any]]  # settings of the kind
    gates: Mapped[dict[str, Any]]
    overlap: Mapped[int]  # judgements of a task that has more than one
    overlap_share: Mapped[float] = mapped_column(Float)  # of the tasks
    gold_rate: Mapped[float] = mapped_column(Float)
    training_tasks: Mapped[int]
    lease_minutes: Mapped[int]
    seed: Mapped[int]
    status: Mapped[str] = mapped_column(String(16), default="open")
    guidelines_version: Mapped[int] = mapped_column(default=1)
    tasks_added: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class LabelGuidelines(Record):
    """One version of what labelers are told, in Markdown."""

    __tablename__ = "label_guidelines"

    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class LabelTask(Record):
    """A prompt whose answers are to be judged."""

    __tablename__ = "label_tasks"
    __table_args__ = (
        Index("ix_label_tasks_queue", "label_project_id", "status", "judged", "number"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"))
    number: Mapped[int]  # in the order of adding
    prompt: Mapped[Any] = mapped_column(JSON)  # text, or messages
    priority: Mapped[int] = mapped_column(default=0)
    gold: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    is_training: Mapped[bool] = mapped_column(default=False)
    wanted: Mapped[int]  # judgements; gold tasks are given to everybody
    judged: Mapped[int] = mapped_column(default=0)  # judgements that count
    leased: Mapped[int] = mapped_column(default=0)  # in somebody's hands now
    status: Mapped[str] = mapped_column(String(16), default="open")  # open, done, dropped
    settled: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # adjudicated
    end_user: Mapped[str | None] = mapped_column(String(128), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class Candidate(Record):
    """An answer of a task; labelers see its text alone."""

    __tablename__ = "label_candidates"
    __table_args__ = (UniqueConstraint("task_id", "position"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    task_id: Mapped[str] = mapped_column(ForeignKey("label_tasks.id"))
    position: Mapped[int]
    text: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None]  # the adapter version
    origin: Mapped[dict[str, Any]]  # sampling fields, completion id, token ids


class Assignment(Record):
    """A task in one labeler's hands; nobody gets a task twice."""

    __tablename__ = "label_assignments"
    __table_args__ = (
        UniqueConstraint("task_id", "labeler"),
        Index("ix_label_assignments_state", "state", "expires_at"),
        Index("ix_label_assignments_labeler", "label_project_id", "labeler", "state"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    task_id: Mapped[str] = mapped_column(ForeignKey("label_tasks.id"))
    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"))
    labeler: Mapped[str] = mapped_column(String(64))
    order: Mapped[list[Any]] = mapped_column("shown_order", JSON)  # positions as shown
    guidelines_version: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), default="leased")
    served_at: Mapped[int] = mapped_column(BigInteger, default=now)
    expires_at: Mapped[int] = mapped_column(BigInteger)


class Judgement(Record):
    """What a labeler said of a task, by positions of candidates, whatever was shown where."""

    __tablename__ = "label_judgements"
    __table_args__ = (Index("ix_label_judgements_project", "label_project_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    assignment_id: Mapped[str] = mapped_column(ForeignKey("label_assignments.id"), index=True)
    task_id: Mapped[str] = mapped_column(ForeignKey("label_tasks.id"), index=True)
    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"))
    labeler: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))  # answer, skip, flag
    answer: Mapped[dict[str, Any]]
    shown_first: Mapped[int]  # position of the candidate that was shown first
    timings: Mapped[dict[str, Any]]
    guidelines_version: Mapped[int]
    counts: Mapped[bool] = mapped_column(default=True)  # not of training, nor taken back
    superseded_by: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class LabelerState(Record):
    """A labeler who was paused in a project, and why."""

    __tablename__ = "label_labelers"

    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"), primary_key=True)
    labeler: Mapped[str] = mapped_column(String(64), primary_key=True)
    paused: Mapped[bool] = mapped_column(default=False)
    reason: Mapped[str | None]
    changed_at: Mapped[int] = mapped_column(BigInteger, default=now)


class StoredCompletion(Record):
    """A completion of `/v1/completions` that its account asked to store."""

    __tablename__ = "stored_completions"
    __table_args__ = (Index("ix_stored_completions_project", "project_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str]
    completion: Mapped[dict[str, Any]]
    request: Mapped[dict[str, Any]]
    prompt: Mapped[str] = mapped_column(Text)
    end_user: Mapped[str | None] = mapped_column(String(128), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class Feedback(Record):
    """What a user said of a completion, with all that is needed to learn from it."""

    __tablename__ = "feedback"
    __table_args__ = (Index("ix_feedback_project_created", "project_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    completion_id: Mapped[str] = mapped_column(String(64), index=True)
    index: Mapped[int] = mapped_column("choice", default=0)
    model: Mapped[str]  # the adapter version that answered
    prompt: Mapped[Any] = mapped_column(JSON)  # text, or messages
    answer: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(16))  # rating, preference, correction
    value: Mapped[dict[str, Any]]
    request: Mapped[dict[str, Any]]  # sampling fields
    token_ids: Mapped[list[Any]]
    end_user: Mapped[str | None] = mapped_column(String(128), index=True)
    source: Mapped[str] = mapped_column(String(16))  # api, metadata
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class FeedbackPolicy(Record):
    """Whether an account's users agreed to learning from what they say, and how long it is kept."""

    __tablename__ = "feedback_policies"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    consent: Mapped[bool] = mapped_column(default=True)
    retention_days: Mapped[int | None]


class LabelRound(Record):
    """One turn of the loop: a project's judgements, what was trained on them, what came of it."""

    __tablename__ = "label_rounds"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    label_project_id: Mapped[str] = mapped_column(ForeignKey("label_projects.id"))
    file_id: Mapped[str] = mapped_column(String(64))  # the frozen export, all of it
    training_file: Mapped[str] = mapped_column(String(64))  # without the prompts held out
    method: Mapped[str] = mapped_column(String(16))  # dpo, ppo
    status: Mapped[str] = mapped_column(String(16))
    model: Mapped[str]  # that it starts from: a version, or the base
    suffix: Mapped[str]
    rule: Mapped[dict[str, Any]]
    prompts: Mapped[list[Any]]  # held out, for the comparison
    options: Mapped[dict[str, Any]]  # hyperparameters of the jobs, by method
    reward_job_id: Mapped[str | None]
    policy_job_id: Mapped[str | None]
    candidate: Mapped[str | None]  # the version that was trained
    comparison_id: Mapped[str | None]  # the blind labeling project of new against old
    decision: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None]
    leased_until: Mapped[int] = mapped_column(BigInteger, default=0)  # by a server that samples
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    changed_at: Mapped[int] = mapped_column(BigInteger, default=now)
