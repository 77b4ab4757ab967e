"""What a job would take, told before it is made: its files' faults, tokens, and time.

The tokenizer is passed in. Tokens are counted exactly up to MAX_COUNTED rows; of a larger file
every n-th row is counted. The speed is that of the newest job of the same base on this machine.
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
from data.job_start import check_file, find_start
from data.jsonl import read_numbered_rows
from data.prompt_format import prompt_format
from data.render import render, render_answer
from data.report import Report
from data.rows import Preference, Ranking, Row, Unpaired
from data.tables import Job
from data.validate import validate

MAX_AUTO_LENGTH = 4096  # tokens of the longest row, unless `max_seq_length` says otherwise
MAX_COUNTED = 5000  # rows
SAMPLED = 4


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
        for param, file_id in given.items():
            if file_id is not None:
                check_file(session, project_id, param, file_id)
    found = Estimate(start.base_model if start else spec.model)
    rules = METHODS[spec.method_type]
    markers = [token for token in tokenizer.all_special_tokens if len(token) > 2]
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
    epochs = spec.resolved_hyperparameters()["n_epochs"]
    usual = METHODS[spec.method_type].defaults.get("n_epochs")
    found.examples = report.num_examples
    if epochs == AUTO:
        epochs = auto_epochs(report.num_examples) if usual is None else int(usual)
    found.n_epochs = epochs
    if METHODS[spec.method_type].graded:
        found.tokens = None
        return
    every = -(-report.num_examples // MAX_COUNTED)
    counted = long = tokens = 0
    with files.local_path(project_id, spec.training_file) as path:
        for number, (line, row) in enumerate(read_numbered_rows(path, report.format)):
            if number % every:
                continue
            try:
                rendered = _sequences(tokenizer, row)
            except DataError as error:
                found.faults.append(f"training_file: line {line}: {error.message}")
                return
            counted += 1
            is_long = any(len(ids) > max_length for ids in rendered)
            long += is_long
            if not (is_long and spec.options.get("on_long") == "drop"):
                tokens += sum(min(len(ids), max_length) for ids in rendered)
            if len(found.sample) < SAMPLED:
                found.sample.append(rendered[0][:max_length])
    if long and spec.options.get("on_long") == "error":
        found.faults.append(f"training_file: {long} examples are longer than {max_length} tokens")
    found.exact = every == 1
    found.tokens = round(tokens * report.num_examples / counted)


def _sequences(tokenizer: Any, row: Row) -> list[tuple[int, ...]]:
    """Return the token ids that a row is read as: one sequence for each answer in it."""
    if isinstance(row, Preference):
        answers = [row.chosen, row.rejected]
    elif isinstance(row, Ranking):
        answers = list(row.completions)
    elif isinstance(row, Unpaired):
        answers = [row.completion]
    else:
        return [render(tokenizer, row).input_ids]
    tools = None if isinstance(row, Unpaired) else row.tools
    return [render_answer(tokenizer, row.prompt, one, tools).input_ids for one in answers]


def measured_speed(database: Database, base_model: str) -> float | None:
    """Return the tokens a second that the newest job of a base trained with; None without one."""
    query = (
        select(Job.tokens_per_s)
        .where(Job.base_model == base_model, Job.tokens_per_s.is_not(None))
        .order_by(Job.started_at.desc())
    )
    with database.read() as session:
        return session.scalar(query.limit(1))
