"""A server with pages, people who sign in to it, and a browser that sends its forms."""

from __future__ import annotations

import html
import re
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import Server, running, tiny_settings

from data import people
from data.feedback import projects, tasks
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec

PASSWORD = "correct horse battery"
XSS = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'&'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("web"))) as found:
        yield found


class Browser:
    """Follows redirects, keeps cookies, and says where its forms come from."""

    def __init__(self, server: Server):
        self.url = server.url
        self.http = httpx.Client(base_url=server.url, follow_redirects=True, timeout=60)
        server.clients.callback(self.http.close)

    def get(self, path: str, status: int = 200) -> str:
        answer = self.http.get(path)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("text/html")
        assert "unsafe" not in answer.headers["content-security-policy"]
        return answer.text

    def post(self, path: str, status: int = 200, files: Any = None, **form: Any) -> str:
        answer = self.http.post(path, data=form, files=files, headers={"origin": self.url})
        assert answer.status_code == status, answer.text
        return answer.text

    def sign_in(self, login: str) -> Browser:
        assert "Sign out" in self.post("/web/login", login=login, password=PASSWORD)
        return self


@pytest.fixture
def account(server: Server) -> str:
    return server.new_account(f"pages-{secrets.token_hex(4)}")[0].id


def person(server: Server, account: str, role: str) -> Browser:
    login = f"{role}-{secrets.token_hex(4)}@example.org"
    people.create(server.runtime.database, account, login, role.title(), role, PASSWORD)
    return Browser(server).sign_in(login)


def make_project(
    server: Server, account: str, kind: str = "pairwise", count: int = 4, **values: Any
) -> str:
    database = server.runtime.database
    spec = ProjectSpec(**({"name": f"My {kind}", "kind": kind} | values))
    made = projects.create(database, account, spec)
    texts = {"pairwise": ["good", "bad"], "ranking": ["good", "middling", "bad"]}.get(kind, ["one"])
    tasks.add(
        database,
        account,
        made.id,
        [
            TaskSpec(
                f"question {i}", [CandidateSpec(f"{text} {i}", f"ft:{text}") for text in texts]
            )
            for i in range(count)
        ],
    )
    return made.id


def form_of(text: str) -> tuple[str, dict[str, str]]:
    """Return where the task's form goes, and the letter of each answer shown."""
    action = re.search(r'id="task"[^>]*action="([^"]*)"', text)
    assert action is not None, text
    shown = re.findall(r'data-letter="(\w)".*?<div class="text"[^>]*>(.*?)</div>', text, re.S)
    return action[1], {html.unescape(answer).split()[0]: letter for letter, answer in shown}
