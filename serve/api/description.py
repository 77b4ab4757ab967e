"""What the API says of itself: the OpenAPI document behind `/openapi.json` and `/docs`.

The framework writes it from the routes; here it gets what the framework cannot see: keys, the one
shape of all errors, multipart bodies, and queries that a route reads itself.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.api.middleware import OPEN_PATHS, OPEN_POSTS

ABOUT = (
    "Files, fine-tuning jobs, completions and the rest of OpenAI's API, on this server. Errors are "
    'always `{"error": {"message", "type", "param", "code"}}`; every response has `x-request-id`.'
)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
KEY = {"type": "http", "scheme": "bearer", "description": "A key of an account, or an admin key."}
FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")


def describe_api(app: FastAPI) -> dict[str, Any]:
    """Return the document of an application's routes; it is made once."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=ABOUT, routes=app.routes
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in FRAMEWORKS_OWN:
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    components["securitySchemes"] = {"key": KEY}
    refused = {"schema": {"$ref": "#/components/schemas/Error"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # refused requests answer 400, as below
            operation["responses"]["default"] = {
                "description": "Whatever went wrong",
                "content": {"application/json": refused},
            }
            is_open = path in OPEN_PATHS or (method == "post" and path in OPEN_POSTS)
            operation["security"] = [] if is_open else [{"key": []}]
    app.openapi_schema = document
    return document


def form_body(files: dict[str, str], **texts: str) -> dict[str, Any]:
    """Describe a multipart body: what each file is, and each text."""
    properties: dict[str, Any] = {
        name: {"type": "string", "format": "binary", "description": about}
        for name, about in files.items()
    }
    properties |= {name: {"type": "string", "description": about} for name, about in texts.items()}
    schema = {"type": "object", "properties": properties, "required": list(files)}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def query_of(model: type[BaseModel]) -> dict[str, Any]:
    """Describe the query that a model reads."""
    schema = model.model_json_schema()
    required = schema.get("required", ())
    return {
        "parameters": [
            {"name": name, "in": "query", "required": name in required, "schema": about}
            for name, about in schema["properties"].items()
        ]
    }
