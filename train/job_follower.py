"""What a trainer writes while it runs, recorded with its job: events, numbers, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import adapter_folders, checkpoints, jobs
from data.errors import AdapterRefused
from data.estimate import measured_speed
from data.tables import Job
from train.job_config import resolved_hyperparameters
from train.job_log import (
    EventLine,
    LineTail,
    checkpoint_of,
    metrics_event,
    read_object,
    trainer_event,
)
from train.lease import Lease
from train.run import ADAPTER_FILES, ORIGIN, RunFolder
from train.workshop import Workshop

Numbers = dict[str, Any]


class Follower:
    """Turns what the trainer writes into the job's events, numbers, models and expected end."""

    def __init__(self, shop: Workshop, job: Job, lease: Lease, run: RunFolder):
        self._shop, self._job, self._lease, self._run = shop, job, lease, run
        self._metrics, self._told = LineTail(run.metrics), LineTail(run.events)
        self._first: tuple[float, int, int] | None = None  # time, step and tokens at this start
        self._resolved: Mapping[str, Any] | None = None
        self._trained = job.trained_tokens or 0

    def look(self) -> None:
        """Record what is new; writes nothing when nothing is."""
        metrics, told = self._metrics.read(), self._told.read()
        made = [(record, checkpoint_of(record)) for record in told]
        found = [*map(metrics_event, metrics)]
        found += [trainer_event(record) for record, checkpoint in made if checkpoint is None]
        fields = self._fields(metrics)
        if "hyperparameters" in fields:
            found.append(self._plan_event())
        lines = [line for line in found if line is not None]
        if fields or lines:
            self._record(sorted(lines, key=lambda line: line.time), fields)
        for _, checkpoint in made:
            if checkpoint is not None:
                self._publish(*checkpoint)

    def _record(self, lines: Sequence[EventLine], fields: Mapping[str, Any]) -> None:
        with self._shop.holding(self._job.id, self._lease) as (session, job):
            for name, value in fields.items():
                setattr(job, name, value)
            for line in lines:
                jobs.record_event(
                    session,
                    job.id,
                    line.message,
                    level=line.level,
                    type=line.type,
                    data=line.data,
                    source=line.source,
                )

    def _publish(self, step: int, metrics: Numbers) -> None:
        """Make a checkpoint a model that can be used at once; each step's once."""
        job_id, folder = self._job.id, self._run.model_of(step)
        adapters_dir = self._shop.settings.adapters_dir
        with self._shop.database.read() as session:
            if checkpoints.is_recorded(session, job_id, step):
                return
        if _is_replaced(folder):
            return
        try:
            staged = adapter_folders.stage(adapters_dir, folder, None)
        except (AdapterRefused, OSError) as error:
            if _is_replaced(folder):
                return
            if not isinstance(error, AdapterRefused):
                raise
            with self._shop.holding(job_id, self._lease) as (session, _):
                message = f"The checkpoint of step {step} is not published: {error.public}"
                source = f"checkpoint:{step}"
                jobs.record_event(session, job_id, message, level="warn", source=source)
            return
        published = False
        try:
            origin = read_object(adapters_dir / staged.path / ORIGIN) or {}
            fingerprint = str(origin.get("base_fingerprint"))
            with self._shop.holding(job_id, self._lease) as (session, job):
                version = checkpoints.add(session, job, staged, fingerprint, step, metrics)
                keep = job.options.get("keep_checkpoints", self._shop.settings.keep_checkpoints)
                checkpoints.prune(session, job_id, keep)
                message = f"Checkpoint created at step {step}: {version.name}"
                data = {"step": step, "model": version.name, "metrics": metrics}
                jobs.record_event(session, job_id, message, data=data, source=f"checkpoint:{step}")
                published = True
            adapter_folders.sweep_job(self._shop.database, adapters_dir, job_id)
        finally:
            if not published:
                adapter_folders.discard(adapters_dir, staged)

    def _fields(self, metrics: Sequence[Mapping[str, Any]]) -> Numbers:
        fields: Numbers = {}
        if self._resolved is None:
            self._resolved = read_object(self._run.resolved)
            if self._resolved is not None:
                fields["hyperparameters"] = resolved_hyperparameters(self._resolved, self._run)
        for line in metrics:
            fields |= self._estimate(line) | self._count(line)
        return fields

    def _count(self, line: Mapping[str, Any]) -> Numbers:
        """Tell how much was trained, so that a job that is cancelled or fails is billed for it.

        Steps that are done again after a crash do not count twice.
        """
        tokens = line.get("trained_tokens")
        if not isinstance(tokens, int) or tokens <= self._trained:
            return {}
        self._trained = tokens
        return {"trained_tokens": tokens}

    def _estimate(self, line: Mapping[str, Any]) -> Numbers:
        """Tell how fast this start trains, and when it will be done if it goes on so."""
        step, total_steps, moment = line.get("step"), line.get("total_steps"), line.get("time")
        if not (isinstance(step, int) and isinstance(total_steps, int) and total_steps > 0):
            return {}
        if not isinstance(moment, int | float):
            return {}
        tokens = line.get("trained_tokens")
        if not isinstance(tokens, int):
            tokens = self._first[2] if self._first else 0
        begun, first_step, first_tokens = self._first = self._first or (moment, step, tokens)
        if step <= first_step or moment <= begun:
            return {}
        seconds = moment - begun
        left_s = (total_steps - step) * seconds / (step - first_step)
        speed = (tokens - first_tokens) / seconds
        if speed <= 0:
            return {"estimated_finish": int(moment + left_s)}
        total_tokens = self._total_tokens()
        if total_tokens:
            left_s = total_tokens * (1 - step / total_steps) / speed
        return {"estimated_finish": int(moment + left_s), "tokens_per_s": round(speed, 1)}

    def _plan_event(self) -> EventLine | None:
        """Tell how much there is to train on, and for how long by what earlier jobs took."""
        examples = ((self._resolved or {}).get("train_data") or {}).get("examples")
        total = self._total_tokens()
        if not examples or not total:
            return None
        speed = measured_speed(self._shop.database, self._job.base)
        price = self._shop.settings.prices.training
        data = {
            "examples": examples,
            "tokens": total,
            "est_seconds": round(total / speed, 1) if speed else None,
            "est_cost": total * price / 1e6,
            "plan": (self._resolved or {}).get("plan"),
        }
        message = f"Training on {examples} examples, {total} tokens in all"
        return EventLine(0.0, message, "info", "message", data, "plan")

    def _total_tokens(self) -> int:
        resolved = self._resolved or {}
        data, plan = resolved.get("train_data") or {}, resolved.get("plan") or {}
        return int(data.get("tokens") or 0) * int(plan.get("num_epochs") or 0)


def _is_replaced(folder: Path) -> bool:
    """Tell whether a checkpoint's model, which appears whole, was removed for newer ones since, or
    is being removed."""
    return not all((folder / name).exists() for name in (*ADAPTER_FILES, ORIGIN))
