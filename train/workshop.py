"""What the jobs of one worker share, and the rule that a worker writes only what it holds."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import adapter_folders, job_lease, jobs, registry
from data.db import Database
from data.errors import ModelNotFound, NotFound, StateConflict
from data.files import FileStore
from data.job_methods import METHODS, REWARD_MODEL, score_models
from data.settings import Settings
from data.tables import AdapterVersion, Job, Project
from data.upgrades import UPGRADE
from train.lease import Lease
from train.run import RunFolder, write_json

ACCELERATE = Path(__file__).parents[1] / "configs" / "accelerate" / "one_process.yaml"
INPUTS = "data"  # folder of a run for the job's files
CURRENT = "current.json"  # in it: the version that the job's alias named when it began
MODELS = "models"  # of checkpoints, for publishing
TOKENS = "tokens"  # of the rendered rows
BULK = {  # folders of a run that nobody needs once its job has ended so
    "succeeded": (
        INPUTS,
        MODELS,
        TOKENS,
        "adapter.tmp",
        "checkpoints",
        "adapter",
    ),  # it is published
    "failed": (INPUTS, MODELS, TOKENS, "adapter.tmp", "checkpoints"),
    "cancelled": (INPUTS, MODELS, TOKENS, "adapter.tmp"),
}
TRAINER = (
    sys.executable,
    *("-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE)),
    *("-m", "train.sft"),
)


@dataclass(frozen=True)
class Workshop:
    """A worker's surroundings.

    Attributes:
        stopping: Set when the worker is to end; its jobs are given back.
        base_fingerprint: Returns the fingerprint of a base model that was fetched.
        base_tokenizer: Returns its tokenizer.
        trainer: The command that trains; `--config FILE` is added.
    """

    settings: Settings
    database: Database
    files: FileStore
    worker_id: str
    base_fingerprint: Callable[[str], str]
    base_tokenizer: Callable[[str], Any]
    trainer: Sequence[str] = TRAINER
    stopping: threading.Event = field(default_factory=threading.Event)

    def command(self, job: Job) -> list[str]:
        """Return the command of a job's trainer."""
        if self.trainer is not TRAINER:
            return list(self.trainer)
        return [*TRAINER[:-1], METHODS[job.method["type"]].module]

    def place_reward(self, job: Job) -> Path | None:
        """Put the reward model that a job or its grader names into its run folder, if any is.

        Raises:
            NotFound: It was deleted since the job was made.
            AdapterRefused: Its files are damaged.
        """
        grader = job.method[job.method["type"]].get("grader") or {}
        folder = self.run_of(job).path / INPUTS / "reward_model"
        named = [part["model"] for part in score_models(grader)]
        name = next(iter(named), job.options.get("reward_model"))
        if name is None:
            return None
        if not folder.exists():
            try:
                version = registry.resolve(self.database, job.project_id, name)
            except ModelNotFound as error:
                raise NotFound(
                    f"The reward model {name} was deleted.", code="model_gone"
                ) from error
            adapter_folders.export(version, self.settings.adapters_dir, folder)
        return folder

    def fingerprint_of(self, job: Job) -> str:
        """Return the fingerprint of the base that a job's adapter is made for."""
        return self.base_fingerprint(_base_of(job))

    def tokenizer_of(self, job: Job) -> Any:
        """Return the tokenizer that a job's rows are read with."""
        return self.base_tokenizer(_base_of(job))

    def run_of(self, job: Job) -> RunFolder:
        """Return a job's run folder."""
        return RunFolder(self.settings.runs_dir / job.id)

    def place(self, job: Job, file_id: str, param: str) -> Path:
        """Put one of a job's files into its run folder."""
        return self.files.place(job.project_id, file_id, self.run_of(job).path / INPUTS / param)

    def place_start(self, job: Job) -> Path | None:
        """Put the adapter that a job goes on from into its run folder; None if there is none.

        Raises:
            NotFound: It was deleted since the job was made.
            AdapterRefused: Its files are damaged.
        """
        if job.start_version_id is None:
            return None
        with self.database.read() as session:
            version = session.get(AdapterVersion, job.start_version_id)
        name = "gone" if version is None else version.name.replace("/", "_")
        folder = self.run_of(job).path / INPUTS / "start_adapter" / name  # as reports tell it
        if folder.exists():
            return folder
        if version is None or version.deleted_at is not None:
            raise NotFound(
                "The model that the job goes on from was deleted.", param="model", code="model_gone"
            )
        return adapter_folders.export(version, self.settings.adapters_dir, folder)

    def place_current(self, job: Job) -> Path | None:
        """Put the adapter that the job's model would replace into its run folder.

        None if the alias names none yet, or one of another base or kind, which cannot be compared.

        Raises:
            AdapterRefused: Its files are damaged.
            NotFound: The version that an upgrade replaces was deleted.
        """
        folder = self.run_of(job).path / INPUTS / "compare_with"
        if folder.exists():
            return folder
        if UPGRADE in job.options:
            with self.database.read() as session:
                old = session.get_one(AdapterVersion, job.options[UPGRADE]["version"])
            if old.deleted_at is not None:
                raise NotFound(f"The model {old.name}, which it replaces, was deleted.")
            return adapter_folders.export(old, self.settings.adapters_dir, folder)
        with self.database.read() as session:
            version = self.named(session, job)
        note = self.run_of(job).path / INPUTS / CURRENT
        if not note.exists():
            write_json(note, {"version": version.id if version else None})
        if version is None:
            return None
        if is_judge(version) or version.base_fingerprint != self.fingerprint_of(job):
            return None
        return adapter_folders.export(version, self.settings.adapters_dir, folder)

    def moved(self, session: Session, job: Job) -> AdapterVersion | None:
        """Return what the job's alias names now, where its model was compared with another."""
        note = self.run_of(job).path / INPUTS / CURRENT
        if not note.exists():
            return None
        now = self.named(session, job)
        began = json.loads(note.read_text("utf-8"))["version"]
        return now if now is not None and now.id != began else None

    def named(self, session: Session, job: Job) -> AdapterVersion | None:
        """Return what the alias of the job's model names now; None if it names nothing."""
        slug = session.get_one(Project, job.project_id).slug
        try:
            alias = registry.alias_name(job.base, slug, job.suffix)
            return registry.find_own(session, job.project_id, alias)
        except ModelNotFound:
            return None

    def forget_bulk(self, job_ids: Sequence[str]) -> None:
        """Remove from the runs of jobs that have ended what nobody needs any more.

        Configuration, logs and metrics stay.
        """
        with self.database.read() as session:
            ended = select(Job).where(Job.id.in_(job_ids), Job.status.in_(jobs.FINAL))
            for job in session.scalars(ended):
                for name in BULK[job.status]:
                    shutil.rmtree(self.settings.runs_dir / job.id / name, ignore_errors=True)

    @contextmanager
    def holding(self, job_id: str, lease: Lease) -> Iterator[tuple[Session, Job]]:
        """Write to a job, in one transaction, while it is this worker's.

        Raises:
            StateConflict: The lease was lost; nothing was written.
        """
        if lease.lost.is_set():
            raise StateConflict(f"The worker {self.worker_id} no longer holds the job {job_id}")
        with self.database.write() as session:
            yield session, job_lease.held(session, job_id, self.worker_id)


def is_judge(version: AdapterVersion) -> bool:
    """Return whether a version is a reward model, which answers nothing."""
    return version.lineage.get("kind") == REWARD_MODEL


def _base_of(job: Job) -> str:
    upgrade = job.options.get(UPGRADE)
    return str(upgrade["new_base"]) if upgrade else job.base
