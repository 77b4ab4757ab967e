"""The API's description: `/openapi.json` tells the truth, `/docs` shows it without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import jsonschema
import pytest
from api_server import Server, running, tiny_settings
from fuzz_requests import FORMS

from serve.api.docs_page import render

VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("docs"))) as found:
        yield found


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    answer = httpx.get(f"{server.url}/openapi.json")
    assert answer.status_code == 200
    return answer.json()


class Page(HTMLParser):
    """Reads a page and notes what is in it; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def test_the_page_needs_neither_key_nor_network(server: Server, document: Any) -> None:
    answer = httpx.get(f"{server.url}/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(answer.text)
    assert page.tags & {"script", "link", "img", "iframe", "form", "object", "base"} == set()
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = set(page.values("href"))
    assert links - {f"#{name}" for name in ids} == {"/openapi.json"}
    assert page.values("src") == page.values("style") == []
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "://" not in answer.text
    shown = set(page.text["code"])
    assert shown >= set(document["paths"])
    operations = [one for many in document["paths"].values() for one in many.values()]
    assert set(ids) >= {operation["operationId"] for operation in operations}
    assert set(ids) >= set(document["components"]["schemas"])


def test_the_browser_may_use_its_style_and_nothing_else(server: Server) -> None:
    answer = httpx.get(f"{server.url}/docs")
    rules = dict(
        rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";")
    )
    [style] = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "style-src": f"'sha256-{digest}'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_in_the_document_becomes_markup() -> None:
    evil = "</style><script>alert(1)</script>\"'><img src=x onerror=y> `<b>`"
    schema = {
        "type": "object",
        "description": evil,
        "properties": {
            evil: {"type": evil, "default": evil, "description": evil},
            "b": {"enum": [evil], "maxLength": evil},
            "c": {"$ref": f"#/components/schemas/{evil}"},
        },
    }
    operation = {
        "operationId": evil,
        "description": evil,
        "parameters": [{"name": evil, "in": evil, "schema": {"type": "array", "items": schema}}],
        "requestBody": {"content": {evil: {"schema": schema}}},
    }
    page = Page(
        render(
            {
                "info": {"title": evil, "version": evil, "description": evil},
                "paths": {f"/{evil}": {evil: operation}},
                "components": {"schemas": {evil: schema}},
            }
        )
    )
    assert page.tags & {"script", "img", "b"} == set()
    assert not [name for _, name, _ in page.attributes if name in ("onerror", "src")]


def test_the_document_is_whole(document: Any) -> None:
    ids = [one["operationId"] for many in document["paths"].values() for one in many.values()]
    assert len(ids) == len(set(ids)) > 100
    schemas = document["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert named <= set(schemas)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, form in FORMS.items():
        body = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
        assert set(body["schema"]["required"]) == set(form["files"])
        assert set(body["schema"]["properties"]) >= set(form.get("data", {}))
    costs = document["paths"]["/v1/organization/costs"]["get"]["parameters"]
    told = {parameter["name"]: parameter["required"] for parameter in costs}
    assert told["start_time"] is True
    assert told["group_by"] is False


def test_keys_and_errors_are_as_described(server: Server, document: Any) -> None:
    """Every route without a key: refused where the document asks for one, and as it says."""
    schema = document["components"]["schemas"]["Error"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answer = httpx.request(method, server.url + re.sub(r"\{\w+\}", "x", path))
            assert (answer.status_code == 401) == bool(operation["security"]), (method, path)
            assert "422" not in operation["responses"]
            if answer.status_code >= 400:
                jsonschema.validate(answer.json(), schema)
    http = server.http()
    for answer in (http.get("/v1/models/x"), http.post("/v1/completions", json={"n": 0})):
        jsonschema.validate(answer.json(), schema)
