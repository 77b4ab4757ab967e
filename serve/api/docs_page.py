"""`/docs`: the API's description as one page, made of `/openapi.json`; no script, nothing fetched.

The browser is told to run and load nothing but the page's own style (Content-Security-Policy), so
that not even a mistake in the escaping could do harm.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.deps import Running

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #222; background: #fff; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
code, .method { font-family: ui-monospace, monospace; font-size: 90%; }
summary { cursor: pointer; padding: .25rem 0; }
.method { display: inline-block; min-width: 4.5rem; font-weight: bold; }
.about { color: #555; }
details > div { margin: 0 0 1rem 4.7rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0;
  border-bottom: 1px solid #eee; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } a { color: #8ab4f8; } .about { color: #aaa; }
}
"""
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
REF = "#/components/schemas/"
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs(request: Request, _runtime: Running) -> Response:
    """Show what the API takes."""
    page = render(request.app.openapi())
    return Response(page, media_type="text/html", headers=HEADERS)


def render(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            groups.setdefault(_group(path), []).append(_operation(method, path, operation))
    schemas = document["components"]["schemas"]
    info = document["info"]
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}: API</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{_text(info.get('description', ''))}</p>",
        "<p>All but what is marked <i>open</i> needs <code>Authorization: Bearer KEY</code>. "
        'The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>',
        *(_link(name) for name in groups),
    ]
    for name, operations in groups.items():
        parts += [f'<h2 id="{escape(name)}">{escape(name)}</h2>', *operations]
    parts.append("<h2>Objects</h2>")
    parts += [_schema(name, schema) for name, schema in sorted(schemas.items())]
    parts.append("</body></html>")
    return "\n".join(parts)


def _group(path: str) -> str:
    words = path.removeprefix("/v1").strip("/").split("/")
    return words[0].partition("{")[0] or "/"


def _link(name: str) -> str:
    return f'<a href="#{escape(name)}">{escape(name)}</a> '


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    is_open = "" if operation.get("security") else " <i>open</i>"
    title = operation.get("description") or operation.get("summary", "")
    body = "".join(_details(operation)) or "<p>It takes nothing.</p>"
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><span class="method">'
        f"{escape(method.upper())}</span> <code>{escape(path)}</code>{is_open} "
        f'<span class="about">{_text(title)}</span></summary><div>{body}</div></details>'
    )


def _details(operation: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            p["name"],
            f"{escape(p['in'])}: {_type(p['schema'])}",
            p.get("required", False),
            p["schema"],
        )
        for p in operation.get("parameters", ())
    ]
    if rows:
        yield _table(rows)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p><code>{escape(kind)}</code>: {_type(content['schema'])}</p>"
        yield _fields(content["schema"])


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code> '
        f'<span class="about">{_text(schema.get("description", ""))}</span></summary>'
        f"<div>{_fields(schema) or _type(schema)}</div></details>"
    )


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    return _table(
        [
            (name, _type(field), name in required, field)
            for name, field in schema.get("properties", {}).items()
        ]
    )


def _table(rows: list[tuple[str, str, bool, Mapping[str, Any]]]) -> str:
    """Return a table of names; the second of each row is HTML already."""
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td>"
        f"<td>{'required' if required else _default(schema)}</td>"
        f"<td>{_text(schema.get('description', ''))}</td></tr>"
        for name, kind, required, schema in rows
    )
    return f"<table><tr><th>name</th><th>type</th><th>default</th><th></th></tr>{cells}</table>"


def _default(schema: Mapping[str, Any]) -> str:
    found = schema.get("default")
    return "" if found is None else f"<code>{escape(repr(found))}</code>"


def _type(schema: Mapping[str, Any]) -> str:
    """Return a schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(REF))
        return f'<a href="#{name}">{name}</a>'
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            kinds = [_type(kind) for kind in schema[choice] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds)) or "null"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = schema.get("format", schema.get("type", "any"))
    shown = escape(" or ".join(kind) if isinstance(kind, list) else kind)
    if kind == "array":
        shown += f" of {_type(schema.get('items', {}))}"
    bounds = [text.format(schema[name]) for name, text in LIMITS.items() if name in schema]
    return shown + (f" ({escape(', '.join(bounds))})" if bounds else "")


def _text(words: str) -> str:
    """Return text as HTML, what stands between backticks as code."""
    pieces = escape(words).split("`")
    return "".join(
        f"<code>{piece}</code>" if index % 2 and index < len(pieces) - 1 else piece
        for index, piece in enumerate(pieces)
    )
