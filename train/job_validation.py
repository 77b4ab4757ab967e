"""The first thing that happens to a job: its files are checked, all problems in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from data import content, content_events, content_training, job_pause, jobs
from data.content import Policy
from data.errors import DataError, NotFound
from data.estimate import MAX_AUTO_LENGTH, measured_speed, planned_epochs
from data.job_methods import METHODS, unusable_rows
from data.moderation import classifier
from data.prompt_format import prompt_format
from data.report import Problem, Report
from data.tables import Job
from data.token_count import count_tokens, special_tokens
from data.validate import validate
from train.lease import Lease
from train.workshop import Workshop

LISTED = 20


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a job's files cannot be used."""

    param: str
    message: str
    data: dict[str, Any] | None = None
    code: str | None = None  # default: invalid_PARAM


def validate_job(shop: Workshop, job: Job, lease: Lease) -> None:
    """Check a claimed job's files and queue it, or fail it with every problem found."""
    warnings: list[tuple[str, dict[str, Any]]] = []
    fault, facts = _check_files(shop, job, warnings)
    with shop.holding(job.id, lease) as (session, job):
        if _settle(session, job, fault, warnings):
            jobs.enqueue(session, job, facts)


def validate_late(shop: Workshop, job: Job, lease: Lease) -> bool:
    """Check the files of a queued job that was paused before that; False if it goes no further."""
    warnings: list[tuple[str, dict[str, Any]]] = []
    fault, facts = _check_files(shop, job, warnings)
    with shop.holding(job.id, lease) as (session, job):
        if not _settle(session, job, fault, warnings):
            return False
        job.validated = True
        jobs.record_event(session, job.id, "Files validated", data=facts)
        return True


def _settle(
    session: Session, job: Job, fault: _Fault | None, warnings: Sequence[tuple[str, dict[str, Any]]]
) -> bool:
    """Tell what was found; False when the job ended or was paused."""
    if job_pause.settle(session, job):
        return False
    for message, data in warnings:
        jobs.record_event(session, job.id, message, level="warn", data=data)
    if fault is not None:
        code = fault.code or f"invalid_{fault.param}"
        jobs.fail(session, job, code, fault.message, fault.param, data=fault.data)
        return False
    return True


def _check_files(
    shop: Workshop, job: Job, warnings: list[tuple[str, dict[str, Any]]]
) -> tuple[_Fault | None, dict[str, Any]]:
    files = {"training_file": job.training_file, "validation_file": job.validation_file}
    least = {"training_file": shop.settings.min_examples, "validation_file": 1}
    reports: dict[str, Report] = {}
    tokenizer = shop.tokenizer_of(job)
    markers = special_tokens(tokenizer)
    policy = content.get(shop.database, job.project_id)
    for param, file_id in files.items():
        if file_id is None:
            continue
        try:
            path = shop.place(job, file_id, param)
        except (NotFound, FileNotFoundError):
            return _Fault(param, f"The file {file_id} was deleted or has expired."), {}
        rules = METHODS[job.method["type"]]
        format = prompt_format(path) if rules.graded else "auto"
        report = validate(
            path, format, min_examples=least[param], special_tokens=markers, name=path.name
        )
        if not report.ok:
            return _invalid(param, file_id, report), {}
        misfit = unusable_rows(job.method["type"], job.options, report.format)
        if misfit is not None:
            return _Fault(param, f"The rows of {file_id} {misfit}"), {}
        reports[param] = report
        _note(warnings, f"{file_id}: ", report.warnings, report.warning_counts)
        fault = _screen(shop, job, policy, (param, file_id, path), report, warnings)
        if fault is not None:
            return fault, {}
    formats = {report.format for report in reports.values()}
    if len(formats) > 1:
        told = " and ".join(sorted(str(kind) for kind in formats))
        return _Fault("validation_file", f"The two files hold different kinds of row: {told}."), {}
    path = shop.place(job, job.training_file, "training_file")
    try:
        return None, _outlook(shop, job, path, reports["training_file"], tokenizer)
    except DataError as error:
        return _Fault("training_file", f"{job.training_file}: {error.message}"), {}


def _outlook(
    shop: Workshop, job: Job, path: Path, report: Report, tokenizer: Any
) -> dict[str, Any]:
    """Return what is known of a job whose files are valid: None for what cannot be known yet.

    Raises:
        DataError: A row cannot be rendered; the message names its line.
    """
    kind = job.method["type"]
    known: dict[str, Any] = {
        "examples": report.num_examples,
        "tokens": None,
        "est_seconds": None,
        "est_cost": None,
    }
    if METHODS[kind].graded:  # it samples what it learns from
        return known
    length = job.options.get("max_seq_length", MAX_AUTO_LENGTH)
    counted = count_tokens(path, report, tokenizer, length, job.options.get("on_long") == "drop")
    epochs = planned_epochs(job.hyperparameters["n_epochs"], kind, report.num_examples)
    trained = counted.tokens * epochs
    speed = measured_speed(shop.database, job.base)
    known["tokens"] = counted.tokens
    known["est_seconds"] = None if speed is None else round(trained / speed, 1)
    known["est_cost"] = {
        "value": trained * shop.settings.prices.training / 1e6,
        "currency": "usd",
    }
    return known


def _screen(
    shop: Workshop,
    job: Job,
    policy: Policy,
    file: tuple[str, str, Path],
    report: Report,
    warnings: list[tuple[str, dict[str, Any]]],
) -> _Fault | None:
    """Hold a file against the account's content policy; `file` is parameter, id and path."""
    if policy.training == "off":
        return None
    param, file_id, path = file
    model = classifier.load(shop.settings.moderation_weights)
    found = content_training.screen(path, report.format, policy, model)
    if not found.lines:
        return None
    matched = list(found.matched)
    content_events.note(shop.database, job.project_id, policy, "training", matched, model=job.model)
    message = found.message(file_id)
    if policy.training == "block":
        message = f"{message}. Remove these rows, upload the file again and make a new job."
        return _Fault(param, message, found.data(), code="content_policy_violation")
    warnings.append((message, found.data()))
    return None


def _invalid(param: str, file_id: str, report: Report) -> _Fault:
    errors = [problem.to_dict() for problem in report.problems]
    message = f"The file {file_id} cannot be used.\n{report.summary(LISTED)}"
    return _Fault(param, message, {"errors": errors, "counts": report.counts})


def _note(
    warnings: list[tuple[str, dict[str, Any]]],
    prefix: str,
    problems: Sequence[Problem],
    counts: dict[str, int],
) -> None:
    for code, count in counts.items():
        if not count:
            continue
        of_code = [problem for problem in problems if problem.code == code]
        first = f"; the first: line {of_code[0].line}, {of_code[0].message}" if of_code else ""
        data = {"warnings": [problem.to_dict() for problem in of_code], "count": count}
        warnings.append((f"{prefix}{code}: {count}{first}", data))
