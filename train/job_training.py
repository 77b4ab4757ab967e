"""The main part of a job: its trainer is started, followed, stopped, started again, and ended.

A claimed job is `queued`, or `running` when an earlier worker left it. Either way what that worker
started is ended first, for certain; then the same command on the same run folder goes on from the
newest whole checkpoint. A trainer that is killed is started again, unless that happened
`MAX_CRASHES` times without a new checkpoint.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from data import job_pause, jobs
from data.errors import AdapterRefused, NotFound, StateConflict, ToolkitError
from data.job_start import check_rank
from data.tables import Job, now
from data.upgrades import UPGRADE
from train.exit_cause import Cause, cause_of_exit
from train.job_config import write_config
from train.job_follower import Follower
from train.job_method_config import write_method_config
from train.job_outcome import publish_outcome
from train.job_validation import validate_late
from train.lease import Lease
from train.run import RunFolder, is_disk_full, step_of
from train.trainer_process import TrainerProcess, end_trainers
from train.workshop import Workshop

POLL_S = 0.2
RETRY_S = 2.0
MAX_CRASHES = 5
DATABASE_AWAY = (OperationalError, InterfaceError, TimeoutError)  # busy or unreachable; may pass

log = logging.getLogger("hone.worker")


def train_job(shop: Workshop, job: Job, lease: Lease) -> None:
    """Bring a claimed job to its end, or give it back when the worker is to stop.

    Raises:
        StateConflict: The lease was lost; the trainer is ended, nothing more was written.
        ToolkitError: The job cannot go on; the caller fails it.
        DATABASE_AWAY: The trainer is ended; the job goes on when it is claimed again.
    """
    training = _Training(shop, job, lease)
    end_trainers(training.run.path)
    if not job.validated and not validate_late(shop, job, lease):
        return
    if training.run.result.exists():  # an earlier worker died between training and publishing
        training.publish(training.follow())
        return
    command = training.prepare()
    while training.begin_attempt():
        cause = training.attempt(command)
        if cause is None:
            return
        if not cause.killed:
            training.fail(cause)
            return
        training.last_cause = cause


class _Training:
    """One claimed job and its trainer."""

    def __init__(self, shop: Workshop, job: Job, lease: Lease):
        self.shop, self.job, self.lease = shop, job, lease
        self.run = shop.run_of(job)
        self.last_cause: Cause | None = None

    def prepare(self) -> list[str]:
        """Lay out the run folder; returns the trainer's command."""
        job = self.job
        check_rank(job.options, self.shop.settings.max_lora_rows)  # of upgrades, or a changed limit
        self.run.path.mkdir(parents=True, exist_ok=True)
        try:
            train_file = self.shop.place(job, job.training_file, "training_file")
            validation_file = (
                self.shop.place(job, job.validation_file, "validation_file")
                if job.validation_file
                else None
            )
        except (NotFound, FileNotFoundError) as error:
            raise NotFound(
                "A file of the job was deleted or has expired.", code="invalid_training_file"
            ) from error
        start = self.shop.place_start(job)
        settings, run = self.shop.settings, self.run
        if job.method["type"] == "supervised":
            compares = validation_file is not None or UPGRADE in job.options
            current = self._place_current() if compares else None
            config = write_config(job, settings, run, train_file, validation_file, start, current)
        else:
            reward = self.shop.place_reward(job)
            config = write_method_config(
                job, settings, run, train_file, validation_file, start, reward
            )
        return [*self.shop.command(job), "--config", str(config.resolve())]

    def _place_current(self) -> Path | None:
        try:
            return self.shop.place_current(self.job)
        except AdapterRefused as error:
            with self.shop.holding(self.job.id, self.lease) as (session, job):
                message = (
                    f"The model in use is damaged ({error.public}), so the new one is compared "
                    "with the base model instead"
                )
                jobs.record_event(session, job.id, message, level="warn")
            return None

    def begin_attempt(self) -> bool:
        """Note that the trainer is started; False when the job ended instead."""
        newest = self.run.newest_checkpoint()
        step = step_of(newest) if newest else 0
        place = f"from the checkpoint of step {step}" if step else "from the start"
        with self.shop.holding(self.job.id, self.lease) as (session, job):
            if job_pause.settle(session, job):
                return False
            if step > job.progress_step:
                job.progress_step, job.attempts = step, 0
            if job.attempts >= MAX_CRASHES:
                jobs.fail(session, job, *self._too_many_crashes(job.attempts))
                return False
            job.attempts += 1
            if job.status == "queued":
                first = job.started_at is None
                jobs.move(session, job, "running", started_at=job.started_at or now())
                message = "Fine-tuning job started" if first else f"Training goes on {place}."
                jobs.record_event(session, job.id, message)
            else:
                why = self.last_cause.message if self.last_cause else "The worker stopped"
                message = f"{why}. Training goes on {place}."
                jobs.record_event(session, job.id, message, level="warn")
        return True

    def attempt(self, command: Sequence[str]) -> Cause | None:
        """Run the trainer once; returns what ended it too early, or None when all is settled."""
        self.run.error.unlink(missing_ok=True)
        log_start = self.run.log.stat().st_size if self.run.log.exists() else 0
        follower = self.follow()
        trainer = TrainerProcess(command, self.run.path, self.run.log)
        try:
            while (status := trainer.poll()) is None and not self._is_to_stop():
                try:
                    follower.look()
                except DATABASE_AWAY as error:  # the trainer needs none
                    log.warning("%s: its progress is recorded later: %s", self.job.id, error)
                    follower = self.follow()  # reads all again, and repeats nothing
                    self.lease.lost.wait(RETRY_S)
                time.sleep(POLL_S)
            if self._is_to_stop() and not self.lease.lost.is_set():
                # also where the launcher has ended: whoever stops the worker may signal every
                # process, and the launcher does not wait for the trainer's checkpoint
                trainer.stop(self.shop.settings.cancel_grace_s)
        finally:
            trainer.end()
        if self.run.result.exists():
            self.publish(follower)
            return None
        follower.look()
        cause = None if status is None else cause_of_exit(self.run, status, log_start)
        if cause is None or (cause.killed and self._is_to_stop()):
            self._settle_stop()
            return None
        return cause

    def _is_to_stop(self) -> bool:
        return any(
            flag.is_set() for flag in (self.lease.lost, self.lease.pause, self.shop.stopping)
        )

    def follow(self) -> Follower:
        """Begin to follow what the trainer writes, from the start of its files."""
        return Follower(self.shop, self.job, self.lease, self.run)

    def publish(self, follower: Follower) -> None:
        """Tell the rest of the story, and end the job with its adapter."""
        follower.look()
        publish_outcome(self.shop, self.job, self.lease, self.run)

    def fail(self, cause: Cause) -> None:
        """End the job with its cause."""
        if cause.code == "disk_full":
            _make_room(self.run)
        with self.shop.holding(self.job.id, self.lease) as (session, job):
            if not job_pause.settle(session, job):  # a paused job fails when it goes on
                jobs.fail(session, job, cause.code, cause.message)

    def _settle_stop(self) -> None:
        """The trainer was stopped on purpose: the job is given back as it stands."""
        with self.shop.holding(self.job.id, self.lease) as (session, job):
            job.attempts -= 1  # that was no crash
            if job_pause.settle(session, job):
                return
            jobs.record_event(session, job.id, "The worker stops; training will go on later")
            job.worker_id = job.lease_expires_at = None

    def _too_many_crashes(self, crashes: int) -> tuple[str, str]:
        if self.last_cause is None:
            return "server_restart", (
                f"The worker stopped {crashes} times before training reached a new checkpoint."
            )
        return self.last_cause.code, (
            f"{self.last_cause.message}. It was the crash number {crashes} without a new "
            "checkpoint, so the job was given up"
        )


def fail_job(shop: Workshop, job: Job, lease: Lease, error: Exception) -> None:
    """End a job with an error that stopped the worker from going on with it.

    Where a full disk keeps a finished training from being published, the job is paused instead.
    """
    run, is_kept = shop.run_of(job), False
    code, message, param = "internal_error", f"{type(error).__name__}: {error}", None
    if isinstance(error, ToolkitError):
        code, message, param = error.code or "training_failed", error.public, error.param
    elif is_disk_full(error, shop.settings.home):
        if not lease.lost.is_set():
            _make_room(run)
        is_kept = run.result.exists()
        remedy = (
            "resume the job: its training is done and kept, and is published then"
            if is_kept
            else "create the job again"
        )
        code = "disk_full"
        message = (
            f"The disk of {shop.settings.home.resolve()} is full; free some space and {remedy}"
        )
    try:
        with shop.holding(job.id, lease) as (session, held):
            if job_pause.settle(session, held):
                return
            if not is_kept:
                jobs.fail(session, held, code, message, param)
                return
            job_pause.hold(session, held)
            job_pause.settle(session, held)
            jobs.record_event(session, held.id, message, level="warn")
    except StateConflict as lost:  # cancelled meanwhile, or another worker's
        log.warning("%s: left alone: %s", job.id, lost)


def _make_room(run: RunFolder) -> None:
    """Remove what is half-written, so that a full disk has room for telling the cause."""
    run.prepare()
    shutil.rmtree(run.path / "adapter.tmp", ignore_errors=True)
