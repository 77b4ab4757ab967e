"""`/v1/files`: datasets in, reports and results out."""

from __future__ import annotations

from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response, StreamingResponse

from data.errors import InvalidInput
from data.files import PURPOSES
from data.tables import File
from serve.api.deps import Caller, Running, json_response, page
from serve.api.description import form_body
from serve.api.errors import unknown_parameter
from serve.api.schemas import QueryModel

CHUNK_BYTES = 1 << 20
MAX_LIMIT = 10_000
FORM_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")

router = APIRouter(prefix="/v1")


class ListFiles(QueryModel):
    """Which files to list."""

    purpose: str | None = None
    limit: int = Field(MAX_LIMIT, ge=1, le=MAX_LIMIT)
    order: Literal["asc", "desc"] = "desc"


@router.post(
    "/files",
    openapi_extra=form_body(
        {"file": "The file."},
        purpose=" or ".join(f"`{purpose}`" for purpose in PURPOSES),
        **{
            "expires_after[anchor]": "`created_at`.",
            "expires_after[seconds]": "Seconds after that.",
        },
    ),
)
async def upload_file(request: Request, caller: Caller, runtime: Running) -> Response:
    """Store a file; one that cannot be what its purpose says is refused with the lines at fault."""
    async with request.form(max_files=1, max_fields=8) as form:
        for name in form:
            if name not in FORM_FIELDS:
                raise unknown_parameter(name, FORM_FIELDS)
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise _missing("file", "Send the file as a part of a multipart/form-data body.")
        if not isinstance(purpose, str):
            raise _missing("purpose", "For training data it is `fine-tune`.")
        record = await run_in_threadpool(
            runtime.files.create,
            caller.id,
            upload.file,
            upload.filename or "file",
            purpose,
            _expires_after_s(form),
        )
    return json_response(describe_file(record))


@router.get("/files")
async def list_files(
    query: Annotated[ListFiles, Query()], caller: Caller, runtime: Running
) -> Response:
    """List the account's files."""
    records, has_more = await run_in_threadpool(runtime.files.list, caller.id, **query.model_dump())
    return page([describe_file(record) for record in records], has_more)


@router.get("/files/{file_id}")
async def retrieve_file(file_id: str, caller: Caller, runtime: Running) -> Response:
    """Describe one file."""
    record = await run_in_threadpool(runtime.files.get, caller.id, file_id)
    return json_response(describe_file(record))


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, caller: Caller, runtime: Running) -> Response:
    """Delete a file that no unfinished job needs."""
    await run_in_threadpool(runtime.files.delete, caller.id, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


@router.get("/files/{file_id}/content")
async def download_file(file_id: str, caller: Caller, runtime: Running) -> Response:
    """Send the file's bytes."""
    record = await run_in_threadpool(runtime.files.get, caller.id, file_id)
    stream = await run_in_threadpool(runtime.files.open, caller.id, file_id)
    headers = {
        "content-length": str(record.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(record.filename, safe='')}",
    }
    return StreamingResponse(
        iterate_in_threadpool(_chunks(stream)),
        headers=headers,
        media_type="application/octet-stream",
    )


@router.get("/files/{file_id}/report")
async def report_file(file_id: str, caller: Caller, runtime: Running) -> Response:
    """Check every row of a dataset and tell all that is wrong with it."""
    report = await run_in_threadpool(runtime.files.report, caller.id, file_id)
    return json_response({"object": "file.report", "file_id": file_id, **report})


def describe_file(record: File) -> dict[str, Any]:
    """Return the API's object of a file."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": record.status_details,
    }


def _expires_after_s(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidInput(
            "Invalid 'expires_after.anchor': the only supported value is 'created_at'.",
            param="expires_after.anchor",
        )
    if not (isinstance(seconds, str) and seconds.isascii() and seconds.isdigit()):
        raise InvalidInput(
            "Invalid type for 'expires_after.seconds': expected an integer.",
            param="expires_after.seconds",
            code="invalid_type",
        )
    return int(seconds[:20])


def _chunks(stream: BinaryIO) -> Any:
    with stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _missing(name: str, hint: str) -> InvalidInput:
    message = f"Missing required parameter: '{name}'. {hint}"
    return InvalidInput(message, param=name, code="missing_required_parameter")
