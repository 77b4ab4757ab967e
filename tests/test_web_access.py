"""The pages: signing in and out, forms from elsewhere, roles, other accounts."""

from __future__ import annotations

import secrets

import httpx
import pytest
from api_server import MODEL, Server
from sqlalchemy import select, update
from web_forms import (
    PASSWORD,
    Browser,
    account,
    make_project,
    person,
    server,
)

from data import people
from data.feedback import projects
from data.tables_people import WebSession

__all__ = ["account", "server"]  # fixtures


# ---- signing in ----


def test_nobody_sees_anything_without_a_session(server: Server) -> None:
    for path in ("/web/", "/web/jobs", "/web/label/lproj-x", "/web/projects/new"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/web/login?next=/web/")
    assert "no such page" in Browser(server).get("/web/nowhere", 404)


def test_signing_in_and_out(server: Server, account: str) -> None:
    browser = Browser(server)
    people.create(server.runtime.database, account, "Ann@example.org", "Ann", "labeler", PASSWORD)
    wrong = browser.post("/web/login", 401, login="ann@example.org", password="wrong password")
    unknown = browser.post("/web/login", 401, login="nobody", password=PASSWORD)
    assert all("The login or the password is wrong." in text for text in (wrong, unknown))
    text = browser.post(
        "/web/login", login="ANN@example.org", password=PASSWORD, next="//evil.example"
    )
    assert "Ann (labeler)" in text
    cookie = next(iter(browser.http.cookies.jar))
    assert cookie.name == "hone_session"
    assert cookie.path == "/web"
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "lax"
    with server.runtime.database.read() as session:
        assert cookie.value not in list(session.scalars(select(WebSession.token_hash)))
    token = cookie.value
    browser.post("/web/logout")
    answer = httpx.get(f"{server.url}/web/", cookies={"hone_session": str(token)})
    assert answer.status_code == 303


def test_a_session_ends_with_idleness_a_new_password_and_a_disabled_person(
    server: Server, account: str
) -> None:
    database = server.runtime.database
    login = f"ends-{secrets.token_hex(4)}"
    people.create(database, account, login, "", "labeler", PASSWORD)
    browser = Browser(server).sign_in(login)
    with database.write() as session:
        session.execute(update(WebSession).values(seen_at=1))
    assert "Sign in" in browser.get("/web/")
    browser.sign_in(login)
    people.change(database, login, password=PASSWORD)
    assert "Sign in" in browser.get("/web/")
    browser.sign_in(login)
    people.change(database, login, disabled=True)
    assert "Sign in" in browser.get("/web/")
    assert "wrong" in browser.post("/web/login", 401, login=login, password=PASSWORD)


def test_guessing_is_slowed(server: Server) -> None:
    browser = Browser(server)
    for _ in range(30):
        browser.post("/web/login", 401, login="guessed", password="a guess at it")
    assert "try again in" in browser.post("/web/login", 429, login="guessed", password=PASSWORD)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site", "origin": "HERE"},
        {"sec-fetch-site": "same-site"},
        {"origin": "null"},
        {},
    ],
)
def test_forms_from_elsewhere_are_refused(
    server: Server, account: str, headers: dict[str, str]
) -> None:
    browser = person(server, account, "admin")
    project = make_project(server, account)
    headers = {k: v.replace("HERE", server.url) for k, v in headers.items()}
    for path, form in (
        (f"/web/projects/{project}", {"action": "closed"}),
        ("/web/logout", {}),
        ("/web/login", {"login": "a", "password": "b"}),
    ):
        answer = browser.http.post(path, data=form, headers=headers)
        assert answer.status_code == 403, path
        assert "not sent from a page of this server" in answer.text
    assert projects.get(server.runtime.database, account, project).status == "open"
    browser.get("/web/")


# ---- roles ----


ADMIN = ("/web/rounds", "/web/models", "/web/jobs", "/web/playground", "/web/projects/new")


@pytest.mark.parametrize(("role", "rank"), [("labeler", 0), ("reviewer", 1), ("admin", 2)])
def test_pages_by_role(server: Server, account: str, role: str, rank: int) -> None:
    browser = person(server, account, role)
    project = make_project(server, account)
    for path in ("/web/", f"/web/label/{project}", f"/web/label/{project}/guidelines"):
        browser.get(path)
    browser.get(f"/web/label/{project}/progress")
    for path in (f"/web/projects/{project}", f"/web/projects/{project}/disagreements"):
        text = browser.get(path, 200 if rank >= 1 else 403)
        assert (rank >= 1) == ("My pairwise" in text)
    for path in ADMIN:
        browser.get(path, 200 if rank >= 2 else 403)
    status = 200 if rank >= 2 else 403
    browser.post(f"/web/projects/{project}", status, action="paused")
    browser.post("/web/playground", status, prompt="a", first=MODEL, second=MODEL, max_tokens=1)


def test_another_accounts_pages_are_as_absent(server: Server, account: str) -> None:
    other = server.new_account(f"other-{secrets.token_hex(4)}")[0].id
    browser = person(server, account, "admin")
    theirs = make_project(server, other)
    for path in ("label/{}", "projects/{}", "projects/{}/disagreements", "jobs/{}"):
        for name in (theirs, "lproj-none"):
            answer = browser.http.get("/web/" + path.format(name))
            assert answer.status_code == 404
            assert theirs not in answer.text.replace(name, "")
