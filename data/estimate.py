"""What a job would take, told before it is made: its files' faults, tokens, and time.

The tokenizer is passed in. The speed is that of the newest job of the same base on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from data.db import Database
from data.errors import DataError
from data.files import FileStore
from data.job_methods import METHODS, unusable_rows
from data.job_spec import AUTO, JobSpec, auto_epochs
from data.job_start import check_file, find_start, pin_grader, pin_reward_model
from data.prompt_format import prompt_format
from data.report import Report
from data.tables import Job
from data.token_count import count_tokens, special_tokens
from data.validate import validate

MAX_AUTO_LENGTH = 4096  # tokens of the longest row, unless `max_seq_length` says otherwise


@dataclass(slots=True)
class Estimate:
    """What is known of a job before it runs.

    Attributes:
        tokens: Of one pass over the data; None where a method samples what it learns from.
        reports: What validation found, by the name of the file's parameter.
        faults: Why the job would fail; empty when it would not.
        exact: Whether every row was counted.
        tokens_per_s: None where nothing was measured yet.
        sample: Token ids of a few rows, to measure with.
    """

    base_model: str
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    examples: int = 0
    tokens: int | None = 0
    exact: bool = True
    n_epochs: int = 0
    tokens_per_s: float | None = None
    sample: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def trained_tokens(self) -> int | None:
        return None if self.tokens is None else self.tokens * self.n_epochs


def estimate(
    database: Database,
    files: FileStore,
    project_id: str,
    spec: JobSpec,
    base_models: list[str],
    tokenizer: Any,
    *,
    context_length: int,
    min_examples: int,
) -> Estimate:
    """Check what a job asks and its files, and count what it would train on.

    Raises:
        InvalidInput: The job could not be made.
    """
    given = {"training_file": spec.training_file, "validation_file": spec.validation_file}
    with database.read() as session:
        start = find_start(session, project_id, spec, base_models)
        base_model = start.base_model if start else spec.model
        pin_grader(session, project_id, spec, base_model)
        pin_reward_model(session, project_id, spec, base_model)
        for param, file_id in given.items():
            if file_id is not None:
                check_file(session, project_id, param, file_id)
    found = Estimate(base_model)
    rules = METHODS[spec.method_type]
    markers = special_tokens(tokenizer)
    for param, file_id in given.items():
        if file_id is None:
            continue
        record = files.get(project_id, file_id)
        least = min_examples if param == "training_file" else 1
        with files.open(project_id, file_id) as stream:
            format = prompt_format(stream) if rules.graded else "auto"
        with files.open(project_id, file_id) as stream:
            report = validate(
                stream, format, min_examples=least, special_tokens=markers, name=record.filename
            )
        found.reports[param] = report.to_dict()
        misfit = unusable_rows(spec.method_type, spec.options, report.format)
        if not report.ok:
            found.faults.append(f"{param}: {report.summary(5)}")
        elif misfit is not None:
            found.faults.append(f"{param}: the rows {misfit}")
        elif param == "training_file":
            longest = min(spec.options.get("max_seq_length", MAX_AUTO_LENGTH), context_length)
            _count(found, files, project_id, spec, report, tokenizer, longest)
    found.tokens_per_s = measured_speed(database, found.base_model)
    return found


def _count(
    found: Estimate,
    files: FileStore,
    project_id: str,
    spec: JobSpec,
    report: Report,
    tokenizer: Any,
    max_length: int,
) -> None:
    found.examples = report.num_examples
    asked = spec.resolved_hyperparameters()["n_epochs"]
    found.n_epochs = planned_epochs(asked, spec.method_type, report.num_examples)
    if METHODS[spec.method_type].graded:
        found.tokens = None
        return
    drops_long = spec.options.get("on_long") == "drop"
    try:
        with files.local_path(project_id, spec.training_file) as path:
            counted = count_tokens(path, report, tokenizer, max_length, drops_long)
    except DataError as error:
        found.faults.append(f"training_file: {error.message}")
        return
    if counted.long and spec.options.get("on_long") == "error":
        found.faults.append(
            f"training_file: {counted.long} examples are longer than {max_length} tokens"
        )
    found.exact, found.tokens, found.sample = counted.exact, counted.tokens, counted.sample


def planned_epochs(spec_epochs: Any, method_type: str, num_examples: int) -> int:
    """Return the passes over the data that a job's hyper-parameter stands for."""
    if spec_epochs != AUTO:
        return int(spec_epochs)
    usual = METHODS[method_type].defaults.get("n_epochs")
    return auto_epochs(num_examples) if usual is None else int(usual)


def measured_speed(database: Database, base_model: str) -> float | None:
    """Return the tokens a second that the newest job of a base trained with; None without one."""
    query = (
        select(Job.tokens_per_s)
        .where(Job.base_model == base_model, Job.tokens_per_s.is_not(None))
        .order_by(Job.started_at.desc())
    )
    with database.read() as session:
        return session.scalar(query.limit(1))
