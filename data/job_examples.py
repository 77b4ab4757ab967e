"""The loss of each training row under a job's finished model, as its trainer wrote it down."""

from __future__ import annotations

from typing import Any

import orjson

from data import jobs
from data.db import Database
from data.errors import InvalidInput, StateConflict
from data.files import FileStore

FILENAME = "example_losses.jsonl"
SORTS = ("loss", "line", "tokens")


def list_examples(
    database: Database,
    files: FileStore,
    project_id: str,
    job_id: str,
    sort: str = "-loss",
    limit: int = 20,
    after: str | None = None,
) -> tuple[list[dict[str, Any]], bool]:
    """Return a page of a job's training rows with their losses, and whether more follow.

    Args:
        sort: `loss`, `line` or `tokens`; a `-` before it puts the largest first.
        after: The last id of the page before.

    Raises:
        NotFound: There is no such job, or its list was deleted.
        StateConflict: The job has not succeeded, or had too many rows to be listed.
        InvalidInput: `sort` or `after` is wrong.
    """
    key = sort.removeprefix("-")
    if key not in SORTS:
        supported = ", ".join(f"'{name}', '-{name}'" for name in SORTS)
        raise InvalidInput(
            f"Invalid 'sort': '{sort}'. Supported values are: {supported}.", param="sort"
        )
    job = jobs.get(database, project_id, job_id)
    if job.status != "succeeded":
        raise StateConflict(
            f"The job {job_id} is {job.status}; the losses of its examples are known when it has "
            "succeeded.",
            param="id",
        )
    listed = [files.get(project_id, file_id) for file_id in job.result_files[1:]]
    named = [record.id for record in listed if record.filename == FILENAME]
    if not named:
        raise StateConflict(
            f"The job {job_id} has no losses by example: they are computed for the method "
            "supervised, unless there are more training rows than are listed; its events tell.",
            param="id",
        )
    with files.open(project_id, named[0]) as stream:
        rows = [orjson.loads(line) for line in stream.read().splitlines()]
    rows.sort(key=lambda row: row["line"])
    rows.sort(key=lambda row: row[key], reverse=sort.startswith("-"))
    found = [_describe(row) for row in rows]
    if after is not None:
        ids = [example["id"] for example in found]
        if after not in ids:
            raise InvalidInput(f"Invalid 'after': no example {after}", param="after")
        found = found[ids.index(after) + 1 :]
    return found[:limit], len(found) > limit


def _describe(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"line-{row['line']}", "object": "fine_tuning.job.example", **row}
