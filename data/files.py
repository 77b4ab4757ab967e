"""Files of accounts: bytes in a blob store, rows in the database, never one without the other.

An upload's bytes are received and checked aside, then moved to their place (`data.blobs`), and only
then it gets its row. A crash in between leaves a blob without a row, which `sweep` removes; a row
without bytes cannot happen. Bytes never change afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from data import audit, caps
from data.blobs import BlobStore
from data.containers import check_is_text
from data.db import Database
from data.errors import DataError, InvalidInput, NotFound, QuotaExceeded, StateConflict
from data.settings import Limits
from data.tables import File, Job, new_id, now
from data.tables_surface import Batch
from data.validate import upload_error_message, validate

DEFAULT_MAX_BYTES = 512 << 20
PURPOSES = ("fine-tune", "batch", "evals", "user_data", "feedback")
RESULTS = "fine-tune-results"  # written by hone itself, as is
BATCH_OUTPUT = "batch_output"
JSONL_PURPOSES = {"fine-tune", "batch", "feedback"}
LIVE_JOBS = ("validating_files", "queued", "running", "paused")
LIVE_BATCHES = ("validating", "in_progress", "finalizing", "cancelling")
EXPIRY_RANGE_S = (3600, 2_592_000)
ORPHAN_AGE_S = 24 * 3600
NAME = re.compile(r"[^\w.()@+ -]", re.UNICODE)
MAX_NAME_BYTES = 200


class FileStore:
    """The files of all accounts.

    Args:
        database: Where the rows are.
        blob_url: fsspec URL of the folder for the bytes.
        max_bytes: Largest accepted upload.
        limits: Of accounts that have none of their own.

    Raises:
        InvalidInput: The URL is empty, its protocol unknown, or its driver not installed.
    """

    def __init__(
        self,
        database: Database,
        blob_url: str,
        max_bytes: int = DEFAULT_MAX_BYTES,
        limits: Limits | None = None,
    ):
        self._database = database
        self._blobs = BlobStore(blob_url)
        self._max_bytes = max_bytes
        self.parts = self._blobs.parts
        self.limits = limits or Limits()

    def create(
        self,
        project_id: str,
        stream: BinaryIO | Iterable[bytes],
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
    ) -> File:
        """Store a file and return its row.

        Raises:
            InvalidInput: Purpose or expiry is wrong; `file_too_large` when it exceeds the limit,
                `unsupported_file` when it is no text though the purpose asks for that.
            DataError: Its lines are not JSON objects though the purpose asks for that.
            QuotaExceeded: The account would store more than it may.
        """
        record = self.stage(project_id, stream, filename, purpose, expires_after_s)
        try:
            with self._database.write() as session:
                caps.check_stored_bytes(session, project_id, self.limits, record.bytes)
                session.add(record)
                told = {"purpose": purpose, "bytes": record.bytes}
                audit.record(session, "file.created", record.id, project_id, **told)
        except QuotaExceeded:
            self.discard(record)
            raise
        return record

    def discard(self, record: File) -> None:
        """Remove the bytes of a file that was staged and got no row."""
        self._blobs.remove(record.blob)

    def stage(
        self,
        project_id: str,
        stream: BinaryIO | Iterable[bytes],
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        max_bytes: int | None = None,
    ) -> File:
        """Store a file's bytes for good; the caller adds the row in a transaction of its own."""
        check_request(purpose, expires_after_s)
        filename = safe_name(filename)
        with self._blobs.stage(stream, max_bytes or self._max_bytes) as staged:
            if purpose in JSONL_PURPOSES:
                check_is_text(staged.path, filename)
                _check_lines(staged.path, filename)
            file_id = new_id("file-")
            blob = f"{project_id}/{file_id}"
            self._blobs.publish(staged, blob)
        return File(
            id=file_id,
            project_id=project_id,
            filename=filename,
            purpose=purpose,
            bytes=staged.bytes,
            sha256=staged.sha256,
            blob=blob,
            expires_at=now() + expires_after_s if expires_after_s else None,
        )

    def get(self, project_id: str, file_id: str) -> File:
        """Return a file's row.

        Raises:
            NotFound: There is none, or it is another account's.
        """
        with self._database.read() as session:
            return _find(session, project_id, file_id)

    def find_all(self, project_id: str, file_ids: Sequence[str]) -> Sequence[File]:
        """Return the rows of those of the ids that are there, in order."""
        query = _visible(select(File).where(File.project_id == project_id, File.id.in_(file_ids)))
        with self._database.read() as session:
            found = {record.id: record for record in session.scalars(query)}
        return [found[file_id] for file_id in file_ids if file_id in found]

    def list(
        self,
        project_id: str,
        purpose: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> tuple[list[File], bool]:
        """Return a page of rows and whether more follow; `after` is the last id of the page before.

        Raises:
            InvalidInput: `after` names no file of this account.
        """
        query = _visible(select(File).where(File.project_id == project_id))
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        up = order == "asc"
        with self._database.read() as session:
            if after is not None:
                query = query.where(_beyond(session, project_id, after, up))
            keys = (File.created_at, File.id) if up else (File.created_at.desc(), File.id.desc())
            found = list(session.scalars(query.order_by(*keys).limit(limit + 1)))
        return found[:limit], len(found) > limit

    def delete(self, project_id: str, file_id: str) -> None:
        """Delete a file: its row is marked first, its bytes go after.

        Raises:
            NotFound: There is none.
            StateConflict: A job or batch that has not ended uses it.
        """
        with self._database.write() as session:
            record = _find(session, project_id, file_id)
            users = or_(Job.training_file == file_id, Job.validation_file == file_id)
            busy = session.scalar(
                select(Job.id).where(users, Job.status.in_(LIVE_JOBS), Job.project_id == project_id)
            )
            if busy is not None:
                raise StateConflict(
                    f"The file {file_id} is used by the job {busy}, which has not ended; "
                    "cancel the job or wait for it",
                    param="id",
                )
            batch = session.scalar(
                select(Batch.id).where(
                    Batch.input_file_id == file_id,
                    Batch.status.in_(LIVE_BATCHES),
                    Batch.project_id == project_id,
                )
            )
            if batch is not None:
                raise StateConflict(
                    f"The file {file_id} is used by the batch {batch}, which has not ended; "
                    "cancel the batch or wait for it",
                    param="id",
                )
            record.deleted_at = now()
            audit.record(session, "file.deleted", file_id, project_id)
        self._blobs.remove(record.blob)

    def open(self, project_id: str, file_id: str) -> BinaryIO:
        """Open a file's bytes for reading.

        Raises:
            NotFound: There is none, or it was deleted this very moment.
        """
        record = self.get(project_id, file_id)
        try:
            return self._blobs.open(record.blob)
        except FileNotFoundError:
            self.get(project_id, file_id)  # deleted since, which is no fault of the server's
            raise

    @contextmanager
    def local_path(self, project_id: str, file_id: str) -> Iterator[Path]:
        """Yield a path with the file's bytes; a remote blob is copied for the time of the block."""
        record = self.get(project_id, file_id)
        with self._blobs.local_path(record.blob, record.filename) as path:
            yield path

    def place(self, project_id: str, file_id: str, folder: Path) -> Path:
        """Put a file below a folder under its own name, for as long as that folder lives."""
        record = self.get(project_id, file_id)
        folder.mkdir(parents=True, exist_ok=True)
        target, partial = folder / record.filename, folder / f".{file_id}"
        partial.unlink(missing_ok=True)
        self._blobs.copy_to(record.blob, partial)
        os.replace(partial, target)
        partial.unlink(missing_ok=True)  # a rename between two names of one file does nothing
        return target

    def report(self, project_id: str, file_id: str) -> dict[str, Any]:
        """Check every row of a dataset; the outcome is kept, as a file never changes."""
        record = self.get(project_id, file_id)
        if record.report is None:
            with self.open(project_id, file_id) as stream:
                report = validate(stream, name=record.filename).to_dict()
            with self._database.write() as session:
                _find(session, project_id, file_id).report = report
            record.report = report
        return record.report

    def sweep(self, min_age_s: float = ORPHAN_AGE_S) -> Sequence[str]:
        """Delete expired files, then blobs and staging files that no row names.

        Args:
            min_age_s: Younger blobs may belong to an upload under way.

        Returns:
            The names of the blobs removed.
        """
        with self._database.write() as session:
            in_use = select(Job.id).where(
                or_(Job.training_file == File.id, Job.validation_file == File.id),
                Job.status.in_(LIVE_JOBS),
            )
            asked = select(Batch.id).where(
                Batch.input_file_id == File.id, Batch.status.in_(LIVE_BATCHES)
            )
            expired = update(File).where(
                File.deleted_at.is_(None),
                File.expires_at <= now(),
                ~in_use.exists(),
                ~asked.exists(),
            )
            session.execute(expired.values(deleted_at=now()))
        with self._database.read() as session:
            known = set(session.scalars(select(File.blob).where(File.deleted_at.is_(None))))
        removed = []
        for blob in self._blobs.orphans(known, min_age_s):
            self._blobs.remove(blob)
            removed.append(blob)
        return removed


def safe_name(filename: str) -> str:
    """Return the last part of a client's file name without anything that a path could mean."""
    name = NAME.sub("_", filename.replace("\\", "/").rpartition("/")[2]).strip(". ")
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "file"


def check_request(purpose: str, expires_after_s: int | None) -> None:
    """Raise InvalidInput unless a file may have this purpose and expiry."""
    if purpose not in (*PURPOSES, RESULTS, BATCH_OUTPUT):
        raise InvalidInput(
            f"Invalid value: '{purpose}'. Supported values are: {', '.join(map(repr, PURPOSES))}.",
            param="purpose",
        )
    low, high = EXPIRY_RANGE_S
    if expires_after_s is not None and not low <= expires_after_s <= high:
        raise InvalidInput(
            f"Invalid 'expires_after.seconds': {expires_after_s}; give {low} to {high}",
            param="expires_after.seconds",
        )


def _check_lines(path: Path, filename: str) -> None:
    report = validate(path, level="syntax", name=filename)
    message = upload_error_message(report)
    if message is not None:
        lines = [
            {key: problem.to_dict()[key] for key in ("line", "column", "code", "message")}
            for problem in report.problems
        ]
        raise DataError(message, lines=lines, param="file")


def _visible(query: Any) -> Any:
    unexpired = or_(File.expires_at.is_(None), File.expires_at > now())
    return query.where(File.deleted_at.is_(None), unexpired)


def _find(session: Session, project_id: str, file_id: str) -> File:
    query = _visible(select(File).where(File.id == file_id, File.project_id == project_id))
    record: File | None = session.scalar(query)
    if record is None:
        raise NotFound(f"No such File object: {file_id}", param="id")
    return record


def _beyond(session: Session, project_id: str, after: str, up: bool) -> Any:
    mark = session.scalar(select(File).where(File.id == after, File.project_id == project_id))
    if mark is None:
        raise InvalidInput(f"Invalid 'after': no File object {after}", param="after")
    if up:
        later = File.created_at > mark.created_at
        tied = (File.created_at == mark.created_at) & (File.id > mark.id)
    else:
        later = File.created_at < mark.created_at
        tied = (File.created_at == mark.created_at) & (File.id < mark.id)
    return or_(later, tied)
