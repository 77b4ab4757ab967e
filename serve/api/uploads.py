"""`/v1/uploads`: large files in parts."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response

from data.errors import InvalidInput
from data.tables_surface import Upload
from serve.api.deps import Caller, Running, json_response
from serve.api.description import form_body
from serve.api.errors import unknown_parameter
from serve.api.files import describe_file
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import RequestModel

router = APIRouter(prefix="/v1/uploads", route_class=StrictJsonRoute)


class ExpiresAfter(RequestModel):
    """When the finished file expires."""

    anchor: Literal["created_at"]
    seconds: int


class CreateUpload(RequestModel):
    """A file that is to come."""

    bytes: int
    filename: str
    mime_type: str
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(RequestModel):
    """The parts in order."""

    part_ids: list[str]
    md5: str | None = None


@router.post("")
async def create_upload(body: CreateUpload, caller: Caller, runtime: Running) -> Response:
    """Announce a file."""
    upload = await run_in_threadpool(
        lambda: runtime.uploads.create(
            caller.id,
            filename=body.filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            num_bytes=body.bytes,
            expires_after_s=None if body.expires_after is None else body.expires_after.seconds,
        )
    )
    return json_response(_describe(upload))


@router.post("/{upload_id}/parts", openapi_extra=form_body({"data": "The part's bytes."}))
async def add_part(upload_id: str, request: Request, caller: Caller, runtime: Running) -> Response:
    """Store one part."""
    async with request.form(max_files=1, max_fields=1) as form:
        for name in form:
            if name != "data":
                raise unknown_parameter(name, ["data"])
        part = form.get("data")
        if not isinstance(part, UploadFile):
            raise InvalidInput(
                "Missing required parameter: 'data'. Send the part as a file of a "
                "multipart/form-data body.",
                param="data",
                code="missing_required_parameter",
            )
        stored = await run_in_threadpool(runtime.uploads.add_part, caller.id, upload_id, part.file)
    return json_response(
        {
            "id": stored.id,
            "object": "upload.part",
            "created_at": stored.created_at,
            "upload_id": upload_id,
        }
    )


@router.post("/{upload_id}/complete")
async def complete_upload(
    upload_id: str, body: CompleteUpload, caller: Caller, runtime: Running
) -> Response:
    """Join the parts to a file."""
    upload, record = await run_in_threadpool(
        runtime.uploads.complete, caller.id, upload_id, body.part_ids, body.md5
    )
    return json_response(_describe(upload) | {"file": describe_file(record)})


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: str, caller: Caller, runtime: Running) -> Response:
    """Drop an upload and its parts."""
    upload = await run_in_threadpool(runtime.uploads.cancel, caller.id, upload_id)
    return json_response(_describe(upload))


def _describe(upload: Upload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None,
    }
