"""Roles of keys, tried on every route that the application has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai import OpenAI

from data import accounts, roles
from data.errors import Forbidden
from serve.app import create_app

OPEN = {"/health", "/docs", "/openapi.json", "/v1/access_requests"}
# What the contract reserves for owners, as the routes are written.
OWNERS = {
    ("DELETE", "/v1/models/{model}"),
    ("POST", "/v1/fine_tuning/checkpoints/{model}/permissions"),
    ("DELETE", "/v1/fine_tuning/checkpoints/{model}/permissions/{permission_id}"),
    ("GET", "/v1/api_keys"),
    ("POST", "/v1/api_keys"),
    ("DELETE", "/v1/api_keys/{api_key_id}"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("roles"))) as found:
        yield found


@pytest.fixture(scope="module")
def calls(server: Server) -> list[tuple[str, str]]:
    """Method and pattern of every route that keys of accounts can reach."""
    app = create_app(server.runtime.settings, server.runtime)
    found = {
        (method, re.sub(r":path}", "}", path))
        for path, operations in app.openapi()["paths"].items()
        for method in (name.upper() for name in operations)
    }
    reached = [
        (method, path)
        for method, path in sorted(found)
        if path not in OPEN and not path.startswith("/v1/organization/") and path != "/metrics"
    ]
    assert len(reached) > 60
    assert set(reached) >= OWNERS
    return reached


def key_of(server: Server, role: Any) -> httpx.Client:
    _, key = accounts.create_key(server.runtime.database, server.project.id, role=role)
    return server.http(key)


def allowed(role: str, method: str, path: str) -> bool:
    if role == "labeler":
        return path.startswith("/v1/comparisons")
    if role == "reader":
        takes = path == "/v1/comparisons/next"  # a task into hand
        return method == "GET" and (method, path) not in OWNERS and not takes
    return role == "owner" or (method, path) not in OWNERS


@pytest.mark.parametrize("role", ["owner", "member", "reader", "labeler"])
def test_every_route(server: Server, calls: list[tuple[str, str]], role: str) -> None:
    http = key_of(server, role)
    wrong = []
    for method, path in calls:
        url = re.sub(r"{[^}]*}", "nothing", path)
        answer = http.request(method, url, json={} if method == "POST" else None)
        refused = answer.status_code == 403
        if refused:
            assert answer.json()["error"]["code"] == "insufficient_permissions", answer.text
            assert answer.json()["error"]["type"] == "permission_error"
            assert answer.headers["x-should-retry"] == "false"
        if refused == allowed(role, method, path):
            wrong.append((method, path, answer.status_code))
    assert wrong == []


def test_a_labeler_may_compare(server: Server) -> None:
    answer = key_of(server, "labeler").get("/v1/comparisons/next")
    assert answer.status_code != 403
    assert key_of(server, "labeler").get("/v1/comparisons_x").status_code == 403


def test_encoded_paths_are_the_same_paths(server: Server) -> None:
    http = key_of(server, "member")
    for path in ("/v1/models/ft%3Aa%2Fb:x", "/v1/%6Dodels/x", "/v1/models//x"):
        assert http.delete(path).status_code == 403, path


def test_control_characters_in_a_path_open_nothing(server: Server) -> None:
    calls: list[tuple[str, str]] = [
        ("POST", "/v1/api_keys"),
        ("GET", "/v1/api_keys"),
        ("DELETE", "/v1/models/ft:x:acme::1"),
        ("POST", "/v1/fine_tuning/checkpoints/ft:x:acme::1/permissions"),
        ("DELETE", "/v1/fine_tuning/checkpoints/ft:x:acme::1/permissions/cp_1"),
    ]
    before = len(accounts.list_keys(server.runtime.database, server.project.id)) + 3
    for role in ("member", "reader", "owner"):
        http = key_of(server, role)
        for method, path in calls:
            for odd in ("%0A", "%0a%0A", "%00", "%0D", "%C2%85"):
                body = {"name": "mine", "role": "owner"} if method == "POST" else None
                answer = http.request(method, path + odd, json=body)
                assert answer.status_code == 404, (role, method, path, odd)
                assert answer.json()["error"]["code"] == "unknown_url"
    assert len(accounts.list_keys(server.runtime.database, server.project.id)) == before
    for role in ("member", "reader", "labeler"):  # were a route to be reached all the same
        for method, path in calls:
            with pytest.raises(Forbidden):
                roles.check(role, method, path + "\n")
    with pytest.raises(Forbidden):
        roles.check("member", "DELETE", "/v1/models/a\nb")


def test_nul_in_a_query_is_refused_by_name(server: Server) -> None:
    answer = server.http().get("/v1/models?limit=1&after=a%00b")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "after"


def test_a_member_runs_and_a_reader_does_not(server: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    assert key_of(server, "member").post("/v1/completions", json=body).status_code == 200
    assert key_of(server, "reader").post("/v1/completions", json=body).status_code == 403
    assert key_of(server, "reader").get("/v1/models").status_code == 200


def test_owners_manage_keys(server: Server) -> None:
    http = server.http()
    made = http.post("/v1/api_keys", json={"name": "ci", "role": "reader"}).json()
    assert server.http(made["value"]).get("/v1/models").status_code == 200
    shown = http.get("/v1/api_keys", params={"limit": 100}).json()["data"]
    listed = {key["id"]: key for key in shown}
    assert listed[made["id"]]["role"] == "reader"
    assert "value" not in listed[made["id"]]
    assert http.delete(f"/v1/api_keys/{made['id']}").json()["deleted"] is True
    assert server.http(made["value"]).get("/v1/models").status_code == 401
    assert http.post("/v1/api_keys", json={"role": "king"}).json()["error"]["param"] == "role"


def test_roles_of_service_accounts(server: Server) -> None:
    _, admin_key = accounts.create_admin_key(server.runtime.database)
    operator = OpenAI(base_url=f"{server.url}/v1", admin_api_key=admin_key, max_retries=0)
    programs = server.clients.enter_context(operator).admin.organization.projects.service_accounts
    made = programs.create(server.project.id, name="trainer")
    assert made.role == "member"
    assert made.api_key is not None
    http = server.http(made.api_key.value)
    assert http.delete("/v1/models/nothing").status_code == 403
    changed = programs.update(made.id, project_id=server.project.id, role="owner")
    assert changed.role == "owner"
    assert http.delete("/v1/models/nothing").status_code == 404
    path = f"/v1/organization/projects/{server.project.id}/service_accounts"
    reader = server.http(admin_key).post(path, json={"name": "r", "role": "reader"}).json()
    assert reader["role"] == "reader"
    assert server.http(reader["api_key"]["value"]).post("/v1/completions").status_code == 403
