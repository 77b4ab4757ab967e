"""The last part of a job: its adapter, its table of metrics and its success, all or nothing.

The adapter's folder and the table's bytes are put in place first; then one transaction adds their
rows, moves the alias and ends the job. A crash before it leaves files that no row names, which the
sweeps remove, and a run folder with a result, with which the next worker does the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from data import adapter_folders, bias, job_pause, jobs, registry, upgrades
from data.checkpoints import mark_of
from data.feedback import round_steps
from data.files import RESULTS
from data.tables import AdapterVersion, Job, Project
from train.job_config import resolved_hyperparameters
from train.job_log import read_object, step_metrics_csv
from train.lease import Lease
from train.run import RunFolder
from train.workshop import Workshop, is_judge

TABLE = "step_metrics.csv"


def publish_outcome(shop: Workshop, job: Job, lease: Lease, run: RunFolder) -> None:
    """Publish a finished run and end its job.

    Raises:
        AdapterRefused: The adapter failed a check.
        StateConflict: The lease was lost; nothing was published.
    """
    result = json.loads(run.result.read_text("utf-8"))
    resolved = read_object(run.resolved)
    fingerprint = shop.fingerprint_of(job)
    adapters_dir = shop.settings.adapters_dir
    tables = [shop.files.stage(job.project_id, [step_metrics_csv(run.metrics)], TABLE, RESULTS)]
    for path in (run.losses, run.completions, run.card, run.report):
        if path.exists():
            with path.open("rb") as stream:
                tables.append(shop.files.stage(job.project_id, stream, path.name, RESULTS))
    report = read_object(run.adapter / bias.FILE)
    limits = shop.settings.bias_limits.model_dump()
    staged = adapter_folders.stage(adapters_dir, run.adapter, fingerprint)
    published = False
    try:
        with shop.holding(job.id, lease) as (session, job):
            if job_pause.settle(session, job):
                pass  # it is published when the job goes on
            else:
                if job.status == "queued":  # it was paused when its trainer had just ended
                    jobs.move(session, job, "running")
                gate = _still_compared(shop.moved(session, job), result.get("gate"))
                gate = bias.limited(gate, report, limits)
                version = registry.record(
                    session,
                    session.get_one(Project, job.project_id),
                    staged,
                    job.base,
                    fingerprint,
                    suffix=job.suffix,
                    job_id=job.id,
                    lineage={
                        "kind": job.method["type"],
                        "result": result,
                        "gate": gate,  # of the result, and of bias limits
                        "resolved": resolved,
                        "start_version": job.start_version_id,
                        **_upgraded_from(job),
                    },
                    mark=mark_of(job.id),
                )
                _tell_bias(session, job, report)
                _promote(session, job, version, gate, shop.named(session, job))
                session.add_all(tables)
                file_ids = [table.id for table in tables]
                _succeed(session, job, result, resolved, file_ids, version.name, run)
                published = True
    finally:
        if not published:
            adapter_folders.discard(adapters_dir, staged)


def _still_compared(
    moved: AdapterVersion | None, gate: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Close a gate that compared with a version which the alias no longer names."""
    if moved is None or gate is None or not gate["promote"]:
        return gate
    reason = f"{moved.name} came into use meanwhile, and the new model was not compared with it"
    return {"promote": False, "reasons": [reason]}


def _upgraded_from(job: Job) -> dict[str, str]:
    if upgrades.UPGRADE not in job.options:
        return {}
    return {upgrades.UPGRADED_FROM: job.options[upgrades.UPGRADE]["version"]}


def _tell_bias(session: Session, job: Job, report: Mapping[str, Any] | None) -> None:
    if report is not None:
        data = {**bias.rises_of(report), "change": report["change"]}
        jobs.record_event(session, job.id, bias.in_words(report), data=data)


def _promote(
    session: Session,
    job: Job,
    version: AdapterVersion,
    gate: Mapping[str, Any] | None,
    named: AdapterVersion | None,
) -> None:
    """Point the alias at a version, unless the trainer's gate says no, a round of feedback
    decides, or what is `named` stays, and tell why."""
    deciding = round_steps.decides(session, job)
    if deciding is not None:
        message = f"Not promoted: the round {deciding.id} compares it with the model in use first"
        jobs.record_event(session, job.id, message)
        return
    reasons = (gate or {}).get("reasons") or []
    if gate is None or gate["promote"]:
        kept = _kept(job, version, named)
        if kept is None:
            registry.point_alias(session, version)
        else:
            jobs.record_event(session, job.id, kept, level="warn")
        moved = upgrades.follow(session, job, version)
        if moved:
            jobs.record_event(session, job.id, f"{', '.join(moved)} now name {version.name}")
        if reasons and (moved or kept is None):
            jobs.record_event(
                session, job.id, f"Promoted: {'; '.join(reasons)}", data=dict(gate or {})
            )
        return
    jobs.record_event(
        session,
        job.id,
        f"Not promoted: {'; '.join(reasons)}. The model can be used by its full name, and "
        "promoted by hand",
        level="warn",
        data=dict(gate),
    )


def _kept(job: Job, version: AdapterVersion, named: AdapterVersion | None) -> str | None:
    """Return why the alias of a version goes on naming what it names; None where it may move."""
    if named is None:
        return None
    alias = registry.alias_of(version.name)
    by_hand = f"or promote it by hand: `hone models promote {version.name}`"
    if is_judge(named) != is_judge(version):
        kinds = ["a model that answers", "a reward model"]
        return (
            f"Not promoted: {alias} names {named.name}, {kinds[is_judge(named)]}, and the new one "
            f"is {kinds[is_judge(version)]}. Use it by its full name, give such jobs a suffix of "
            f"their own, {by_hand}"
        )
    if upgrades.UPGRADE in job.options and upgrades.UPGRADED_FROM not in named.lineage:
        return (
            f"{alias} still names {named.name}, with which nothing was compared. Use the new model "
            f"by its full name, by the aliases of the model that it replaces, {by_hand}"
        )
    return None


def _succeed(
    session: Session,
    job: Job,
    result: Mapping[str, Any],
    resolved: Mapping[str, Any] | None,
    file_ids: list[str],
    model: str,
    run: RunFolder,
) -> None:
    fields: dict[str, Any] = {}
    if resolved is not None:
        fields["hyperparameters"] = resolved_hyperparameters(resolved, run)
    jobs.record_event(session, job.id, f"Uploaded result files: {', '.join(file_ids)}")
    jobs.record_event(session, job.id, f"New fine-tuned model created: {model}")
    jobs.move(
        session,
        job,
        "succeeded",
        fine_tuned_model=model,
        result_files=file_ids,
        trained_tokens=result.get("trained_tokens") or job.trained_tokens,  # or as followed
        **fields,
    )
    jobs.record_event(session, job.id, "The job has successfully completed")
