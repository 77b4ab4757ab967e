"""Whether the agreement that a project reports is the one that its labelers have.

Every comparison of the files becomes a task; labelers who err independently, each with the same
probability e, judge all of them. Two of them then agree with probability (1 - e)^2 + e^2, by alpha
1 - 4 e (1 - e), which the report, made from their judgements alone, has to find within its 95 %
intervals.

    python benchmarks/label_agreement.py train.jsonl test.jsonl --error 0.25
    python benchmarks/label_agreement.py rows.jsonl --labelers 3 --error 0.2 --rows 500

Prints one JSON object; ends with 1 where the truth is outside the interval.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select

from data import accounts
from data.db import Database
from data.feedback import imports, judgements, leases, projects, reports, tasks
from data.feedback.judgements import Answer
from data.feedback.projects import ProjectSpec
from data.tables_feedback import Candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSONL of comparisons")
    parser.add_argument("--labelers", type=int, default=2)
    parser.add_argument("--error", type=float, default=0.25, help="of a labeler")
    parser.add_argument("--rows", type=int, help="take the first so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        told = run(arguments, Database(f"sqlite:///{scratch}/hone.db"))
    print(json.dumps(told, indent=2))
    raise SystemExit(0 if told["within"] else 1)


def run(arguments: argparse.Namespace, database: Database) -> dict[str, Any]:
    """Import, judge and report."""
    database.migrate()
    account = accounts.create_account(database, "agreement")[0].id
    spec = ProjectSpec("agreement", "pairwise", overlap=arguments.labelers)
    project = projects.create(database, account, spec).id
    found = [task for file in arguments.files for task in imports.read_tasks(file)]
    different = [task for task in found if task.candidates[0].text != task.candidates[1].text]
    count = tasks.add(database, account, project, different[: arguments.rows])
    with database.read() as session:
        first = select(Candidate.task_id, Candidate.text).where(Candidate.position == 0)
        chosen = dict(session.execute(first).all())
    began = time.monotonic()
    for number in range(arguments.labelers):
        name, draw = f"labeler-{number}", random.Random(f"{arguments.seed}/{number}")
        while (shown := leases.next_task(database, account, project, name)) is not None:
            errs = draw.random() < arguments.error
            right = shown.options[0].text == chosen[shown.task_id]
            answer = Answer(choice="A" if right != errs else "B")
            judgements.submit(database, account, shown.assignment_id, name, answer)
    seconds = time.monotonic() - began
    report = reports.report(database, account, project)
    database.close()
    truth = (1 - arguments.error) ** 2 + arguments.error**2
    true_alpha = 1 - (1 - truth) / 0.5  # two answers, either of them right by accident
    low, high = report.raw_agreement.interval or (1.0, 0.0)
    lowest, highest = report.alpha["choice"].interval or (1.0, 0.0)
    return {
        "tasks": count,
        "left_out": len(found) - len(different),  # both answers are the same text
        "labelers": arguments.labelers,
        "judgements": report.progress.judgements,
        "seconds": round(seconds, 1),
        "true_agreement": round(truth, 4),
        "raw_agreement": asdict(report.raw_agreement),
        "true_alpha": round(true_alpha, 4),
        "within": low <= truth <= high and lowest <= true_alpha <= highest,
        "alpha": {name: asdict(measure) for name, measure in report.alpha.items()},
    }


if __name__ == "__main__":
    main()
