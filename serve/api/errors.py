"""Every failure becomes one shape: `{"error": {"message", "type", "param", "code"}}`.

The HTTP status of each error class is decided here and nowhere else. The framework's own answers
(unknown route, wrong method, malformed JSON, failed validation, a bug) are rewritten too, because
clients read `error.message` and show nothing when it is missing. Wording matters: LangChain and
litellm recognise conditions by phrases in the message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from data import errors
from data.settings import nearest

STATUS_OF_CLASS: dict[type[Exception], int] = {
    errors.InvalidInput: 400,
    errors.StateConflict: 400,  # not 409: the official clients would retry it
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.ToolkitError: 500,
    errors.DeadlineExceeded: 504,
    errors.ModelUnavailable: 503,
    errors.Overloaded: 503,
    errors.QuotaExceeded: 429,
    errors.RateLimited: 429,
}
STATUS_OF_CODE = {"file_too_large": 413, "unsupported_file": 415}
DATABASE_RETRY_S = 5
NEVER_RETRY = (  # fails again
    errors.AdapterRefused,
    errors.DeadlineExceeded,
    errors.Forbidden,
    errors.QuotaExceeded,
)
SIZES = {
    "too_long": ("array too long", "an array with maximum length", "max_length"),
    "too_short": ("array too short", "an array with minimum length", "min_length"),
    "string_too_long": ("string too long", "a string with maximum length", "max_length"),
    "string_too_short": ("string too short", "a string with minimum length", "min_length"),
}
BOUNDS = {
    "greater_than": ("below minimum value", ">", "gt"),
    "greater_than_equal": ("below minimum value", ">=", "ge"),
    "less_than": ("above maximum value", "<", "lt"),
    "less_than_equal": ("above maximum value", "<=", "le"),
}
EXPECTED = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "a boolean",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
}

log = logging.getLogger("hone.requests")


def install(app: FastAPI) -> None:
    """Register the handlers on the application."""
    app.exception_handler(errors.ToolkitError)(_on_toolkit_error)
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(HTTPException)(_on_http_exception)


def status_of(error: errors.ToolkitError) -> int:
    """Return the HTTP status of an error."""
    if error.code in STATUS_OF_CODE:
        return STATUS_OF_CODE[error.code]
    return next(STATUS_OF_CLASS[c] for c in type(error).__mro__ if c in STATUS_OF_CLASS)


def envelope(error: errors.ToolkitError) -> dict[str, Any]:
    """Return the body that tells a client of this error."""
    status = status_of(error)
    body: dict[str, Any] = {
        "message": error.public,
        "type": error.kind or _type_of(status),
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, errors.DataError) and error.lines:
        body["lines"] = error.lines
    return {"error": body}


def error_response(error: errors.ToolkitError) -> Response:
    """Return the complete response for an error, retry headers included."""
    headers = {}
    if isinstance(error, errors.Overloaded):
        headers["retry-after"] = str(max(1, error.retry_after_s))
    if isinstance(error, errors.RateLimited):
        if error.retry_after_s is None:
            headers["x-should-retry"] = "false"
        else:
            headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, NEVER_RETRY):
        headers["x-should-retry"] = "false"
    return _json(status_of(error), envelope(error), headers)


def stopping() -> errors.Overloaded:
    """Return the error of what the end of the server cuts short."""
    return errors.Overloaded(
        "The server is stopping before the answer is complete; ask again.", code="server_stopping"
    )


def for_exception(error: Exception, request_id: str) -> errors.ToolkitError:
    """Return the error told to a client for an exception that no route foresaw."""
    if isinstance(error, DataError):
        return errors.InvalidInput(
            "A value of the request cannot be stored: it is too large or too long, or it holds a "
            "character that may not be stored."
        )
    if isinstance(error, TimeoutError | OperationalError):
        return errors.Overloaded(
            "The server's database is busy or cannot be reached; ask again.",
            retry_after_s=DATABASE_RETRY_S,
        )
    return internal_error(request_id)


def internal_error(request_id: str) -> errors.EngineFailure:
    """Return the error told to a client when hone has a bug; the log has the traceback."""
    return errors.EngineFailure(
        "The server had an error while processing your request. The operator finds the cause in "
        f"the log under the request id {request_id}."
    )


def describe(problems: Sequence[Mapping[str, Any]]) -> errors.ToolkitError:
    """Turn pydantic's findings into the error of the first one, in the API's own words."""
    problem = problems[0]
    kind, context = problem["type"], problem.get("ctx") or {}
    location = [part for part in problem["loc"] if part not in ("body", "query")]
    name, value = _dotted(location), problem.get("input")
    raised = context.get("error")
    if isinstance(raised, errors.ToolkitError):
        raised.param = _dotted([*location, *([raised.param] if raised.param else [])]) or None
        return raised
    if kind == "unknown_parameter":
        return unknown_parameter(context["name"], context["known"], location)
    if kind == "extra_forbidden":
        return unknown_parameter(str(location[-1]), (), location[:-1])
    if kind == "unsupported_parameter":
        name = _dotted([*location, context["name"]])
        message = f"Unsupported parameter: '{name}' is not supported by this server."
        return errors.InvalidInput(message, param=name, code=kind)
    if kind == "nul":
        return has_nul(_dotted([*location, *context["path"]]))
    if kind == "json_invalid" or not location:
        return _bad_body(kind, value)
    if kind == "missing":
        message = f"Missing required parameter: '{name}'."
        return errors.InvalidInput(message, param=name, code="missing_required_parameter")
    if kind in BOUNDS:
        fault, sign, key = BOUNDS[kind]
        bound = context[key]
        number = "decimal" if isinstance(bound, float) else "integer"
        bound = int(bound) if bound == int(bound) else bound
        message = (
            f"Invalid '{name}': {number} {fault}. Expected a value {sign} {bound}, but got "
            f"{_show(value)} instead."
        )
        return errors.InvalidInput(message, param=name)
    if kind in SIZES:
        fault, expected, key = SIZES[kind]
        message = (
            f"Invalid '{name}': {fault}. Expected {expected} {context[key]}, but got length "
            f"{len(value or '')} instead."
        )
        return errors.InvalidInput(message, param=name)
    if kind in ("literal_error", "enum"):
        message = (
            f"Invalid value for '{name}': {_show(value)}. Supported values are: "
            f"{context['expected']}."
        )
        return errors.InvalidInput(message, param=name)
    wanted = EXPECTED.get(kind.split("_")[0])
    if wanted is None:
        return errors.InvalidInput(f"Invalid '{name}': {problem['msg']}.", param=name)
    message = f"Invalid type for '{name}': expected {wanted}, but got {_kind(value)} instead."
    return errors.InvalidInput(message, param=name, code="invalid_type")


def unknown_parameter(
    name: str, known: Sequence[str], location: Sequence[str | int] = ()
) -> errors.InvalidInput:
    """Return the error of a field that does not exist, with the nearest that does."""
    path = _dotted([*location, name])
    guess = nearest(name, known)
    hint = f" Did you mean '{guess}'?" if guess else ""
    message = f"Unknown parameter: '{path}'.{hint}"
    return errors.InvalidInput(message, param=path, code="unknown_parameter")


def has_nul(name: str) -> errors.InvalidInput:
    """Return the error of a parameter with the character NUL, which cannot be stored."""
    return errors.InvalidInput(
        f"Invalid '{name}': it holds the character NUL (U+0000). Send it without.", param=name
    )


async def _on_toolkit_error(_request: Request, error: errors.ToolkitError) -> Response:
    if error.public != error.message:
        log.warning("%s", error)
    return error_response(error)


async def _on_validation_error(_request: Request, error: RequestValidationError) -> Response:
    return error_response(describe(error.errors()))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    status = error.status_code
    body = {"message": str(error.detail), "type": _type_of(status), "param": None, "code": None}
    if status == 404:
        body["message"] = f"Invalid URL ({request.method} {request.url.path})"
        body["code"] = "unknown_url"
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        body["message"] = (
            f"Method {request.method} is not allowed for {request.url.path}; use {allowed}."
        )
        body["code"] = "method_not_allowed"
    elif status == 413:
        body["code"] = "file_too_large"
    elif status == 400 and error.detail == "There was an error parsing the body":
        return error_response(_bad_body("json_invalid", None))
    return _json(status, {"error": body}, dict(error.headers or {}))


def _json(status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    # ASCII output: an echoed lone surrogate would not encode as UTF-8.
    return Response(json.dumps(body), status, dict(headers), media_type="application/json")


def _type_of(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "permission_error" if status == 403 else "invalid_request_error"


def _bad_body(kind: str, value: Any) -> errors.InvalidInput:
    if kind == "json_invalid" or isinstance(value, bytes):
        reason = (
            "We could not parse the JSON body of your request. Send one JSON object, encoded as "
            "UTF-8, with the header Content-Type: application/json."
        )
    elif kind == "missing":
        reason = "The request body is empty; send one JSON object."
    else:
        reason = f"The request body must be a JSON object, but is {_kind(value)}."
    return errors.InvalidInput(reason, code="invalid_json")


def _dotted(location: Sequence[str | int]) -> str:
    """Join as clients know it: `messages[0].content`."""
    text = ""
    for part in location:
        part = f"[{part}]" if isinstance(part, int) else part
        text += part if not text or part.startswith("[") else f".{part}"
    return text


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string"}
    kinds |= {list: "an array", dict: "an object", type(None): "null"}
    return kinds.get(type(value), "something else")


def _show(value: Any) -> str:
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
