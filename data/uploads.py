"""Files that arrive in parts: each part is stored as it comes, and joined when all are there.

An upload that is not completed within an hour expires; the parts of ended uploads are swept. The
bytes announced by pending uploads count against the account's cap when another is announced, and
parts never exceed them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data import audit, caps
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict, ToolkitError
from data.files import FileStore, check_request, safe_name
from data.parts import check_room
from data.tables import File, new_id, now
from data.tables_surface import Upload, UploadPart

EXPIRES_S = 3600
MAX_PART_BYTES = 64 << 20
MAX_BYTES = 8 << 30


class UploadStore:
    """Uploads in parts, beside a store of files."""

    def __init__(self, database: Database, files: FileStore):
        self._database = database
        self._files = files
        self._parts = files.parts

    def create(
        self,
        project_id: str,
        *,
        filename: str,
        purpose: str,
        mime_type: str,
        num_bytes: int,
        expires_after_s: int | None = None,
    ) -> Upload:
        """Announce a file.

        Raises:
            InvalidInput: Purpose, expiry or size are wrong.
            QuotaExceeded: With it and what is pending, the account would store more than it may.
        """
        check_request(purpose, expires_after_s)
        if not 0 < num_bytes <= MAX_BYTES:
            raise InvalidInput(
                f"Invalid 'bytes': expected 1 to {MAX_BYTES}, but got {num_bytes} instead.",
                param="bytes",
            )
        upload = Upload(
            id=new_id("upload_"),
            project_id=project_id,
            filename=safe_name(filename),
            purpose=purpose,
            mime_type=mime_type,
            bytes=num_bytes,
            expires_after_s=expires_after_s,
            expires_at=now() + EXPIRES_S,
        )
        with self._database.write() as session:
            announced = _pending_bytes(session, project_id) + num_bytes
            caps.check_stored_bytes(session, project_id, self._files.limits, announced)
            session.add(upload)
        return upload

    def add_part(self, project_id: str, upload_id: str, stream: BinaryIO) -> UploadPart:
        """Store a part.

        Raises:
            NotFound: There is no such upload.
            StateConflict: It has ended.
            InvalidInput: The part is empty or too large, or more than was announced.
        """
        with self._database.read() as session:
            room = _room(session, _find_pending(session, project_id, upload_id))
        part_id = new_id("part_")
        try:
            num_bytes = self._parts.put(upload_id, part_id, stream, MAX_PART_BYTES, room)
        except FileNotFoundError as error:
            raise _ended(upload_id) from error
        part = UploadPart(id=part_id, upload_id=upload_id, bytes=num_bytes)
        try:
            with self._database.write() as session:
                upload = _find_pending(session, project_id, upload_id)
                check_room(num_bytes, _room(session, upload))  # others may have come meanwhile
                session.add(part)
        except ToolkitError:
            self._parts.remove(upload_id, part_id)
            raise
        return part

    def complete(
        self, project_id: str, upload_id: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[Upload, File]:
        """Join the parts in the order given.

        Raises:
            NotFound: There is no such upload.
            StateConflict: It has ended.
            InvalidInput: A part is not its own or named twice, the bytes are not as many as
                announced, or the MD5 is another; the upload stays as it is.
            DataError: The file cannot be what its purpose says.
            QuotaExceeded: The account would store more than it may; the upload stays as it is.
        """
        with self._database.read() as session:
            upload = _find_pending(session, project_id, upload_id)
            known = {
                part.id: part
                for part in session.scalars(
                    select(UploadPart).where(UploadPart.upload_id == upload_id)
                )
            }
        _check_parts(upload, known, part_ids)
        digest = hashlib.md5(usedforsecurity=False)

        def content() -> Iterator[bytes]:
            for part_id in part_ids:
                try:
                    for chunk in self._parts.read(upload_id, part_id):
                        digest.update(chunk)
                        yield chunk
                except FileNotFoundError as error:
                    raise _ended(upload_id) from error
            if md5 is not None and digest.hexdigest() != md5.lower():
                raise InvalidInput(
                    f"Invalid 'md5': the parts have the MD5 {digest.hexdigest()}, but got {md5} "
                    "instead. Send the parts again.",
                    param="md5",
                )

        record = self._files.stage(
            project_id,
            content(),
            upload.filename,
            upload.purpose,
            upload.expires_after_s,
            max_bytes=MAX_BYTES,
        )
        try:
            with self._database.write() as session:
                upload = _find_pending(session, project_id, upload_id)
                caps.check_stored_bytes(session, project_id, self._files.limits, record.bytes)
                upload.status, upload.file_id = "completed", record.id
                session.add(record)
                told = {"purpose": record.purpose, "bytes": record.bytes}
                audit.record(session, "file.created", record.id, project_id, **told)
        except ToolkitError:
            self._files.discard(record)
            raise
        self._parts.drop(upload_id)
        return upload, record

    def cancel(self, project_id: str, upload_id: str) -> Upload:
        """End an upload and drop its parts.

        Raises:
            NotFound: There is no such upload.
            StateConflict: It has ended.
        """
        with self._database.write() as session:
            upload = _find_pending(session, project_id, upload_id)
            upload.status = "cancelled"
        self._parts.drop(upload_id)
        return upload

    def sweep(self) -> list[str]:
        """Expire what is late and drop the parts of all that have ended; returns expired ids."""
        with self._database.write() as session:
            late = list(
                session.scalars(
                    select(Upload).where(Upload.status == "pending", Upload.expires_at <= now())
                )
            )
            for upload in late:
                upload.status = "expired"
            pending = set(session.scalars(select(Upload.id).where(Upload.status == "pending")))
        for upload_id in self._parts.uploads():
            if upload_id not in pending:
                self._parts.drop(upload_id)
        return [upload.id for upload in late]


def _find_pending(session: Session, project_id: str, upload_id: str) -> Upload:
    upload = session.get(Upload, upload_id)
    if upload is None or upload.project_id != project_id:
        raise NotFound(f"No such Upload object: {upload_id}", param="id")
    status = upload.status
    if status == "pending" and upload.expires_at <= now():
        status = "expired"
    if status != "pending":
        raise StateConflict(
            f"The upload {upload_id} is {status}; begin a new one with POST /v1/uploads.",
            param="id",
        )
    return upload


def _ended(upload_id: str) -> StateConflict:
    return StateConflict(
        f"The upload {upload_id} was completed or cancelled, or has expired, during this call.",
        param="id",
    )


def _pending_bytes(session: Session, project_id: str) -> int:
    """Return what an account has announced and neither completed nor cancelled."""
    query = select(func.coalesce(func.sum(Upload.bytes), 0)).where(
        Upload.project_id == project_id, Upload.status == "pending", Upload.expires_at > now()
    )
    return int(session.scalar(query) or 0)


def _room(session: Session, upload: Upload) -> int:
    query = select(func.coalesce(func.sum(UploadPart.bytes), 0))
    return upload.bytes - int(session.scalar(query.where(UploadPart.upload_id == upload.id)) or 0)


def _check_parts(upload: Upload, known: dict[str, UploadPart], part_ids: Sequence[str]) -> None:
    for index, part_id in enumerate(part_ids):
        if part_id not in known or part_id in part_ids[:index]:
            fault = "is named twice" if part_id in known else "is not a part of this upload"
            raise InvalidInput(
                f"Invalid 'part_ids[{index}]': {part_id} {fault}.", param=f"part_ids[{index}]"
            )
    total = sum(known[part_id].bytes for part_id in part_ids)
    if total != upload.bytes:
        raise InvalidInput(
            f"Invalid 'part_ids': the parts have {total} bytes, but {upload.bytes} were announced. "
            "Send the missing parts, or begin an upload of the right size.",
            param="part_ids",
        )
