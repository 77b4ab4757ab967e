"""Tasks drawn from models: by the API, the command line and a project's page."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import select
from test_api_adapters import publish
from test_metering_ledger import rows
from web_forms import person

from data.errors import InvalidInput
from data.feedback.draws import as_tasks, check_draw
from data.feedback.tasks import CandidateSpec
from data.tables_feedback import Candidate, LabelTask

PROMPTS: list[Any] = ["The cat", [{"role": "user", "content": "Hello"}]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("samples"))) as found:
        yield found


@pytest.fixture(scope="module")
def adapter(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(server, tmp_path_factory.mktemp("adapter"), 1, "mine").name


def make(http: httpx.Client, kind: str) -> str:
    answer = http.post("/v1/label_projects", json={"name": kind, "kind": kind})
    return str(answer.json()["id"])


def draw(http: httpx.Client, project: str, status: int = 200, **fields: Any) -> Any:
    body = {"prompts": PROMPTS, "models": [MODEL], "max_tokens": 8, "seed": 3, **fields}
    answer = http.post(f"/v1/label_projects/{project}/sample", json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]["message"]


def kept(server: Server, project: str) -> list[tuple[Any, list[Candidate]]]:
    with server.runtime.database.read() as session:
        query = select(LabelTask).where(LabelTask.label_project_id == project)
        found = []
        for task in session.scalars(query.order_by(LabelTask.number)):
            mine = select(Candidate).where(Candidate.task_id == task.id)
            found.append((task, list(session.scalars(mine.order_by(Candidate.position)))))
        return found


def test_pairs_of_two_models_are_what_the_models_answer(server: Server, adapter: str) -> None:
    http, client = server.http(), server.client()
    project = make(http, "pairwise")
    fields = {"models": [MODEL, adapter], "count": 2, "user": "ann"}
    told = draw(http, project, **fields)
    assert told == {
        "object": "label_project.tasks",
        "added": 4,
        "left_out": {"same": 0, "empty": 0},
    }
    tasks = kept(server, project)
    assert [task.prompt for task, _ in tasks] == [p for p in PROMPTS for _ in range(2)]
    assert {task.end_user for task, _ in tasks} == {"ann"}
    options: Any = {"max_tokens": 8, "seed": 3, "n": 2, "temperature": 1.0}
    for model, position in ((MODEL, 0), (adapter, 1)):
        plain = client.completions.create(model=model, prompt="The cat", **options)
        chat = client.chat.completions.create(model=model, messages=PROMPTS[1], **options)
        wanted = [choice.text for choice in plain.choices]
        wanted += [choice.message.content or "" for choice in chat.choices]
        found = [candidates[position] for _, candidates in tasks]
        assert [candidate.text for candidate in found] == wanted
        assert {candidate.model for candidate in found} == {model}
        assert found[0].origin.items() >= {"temperature": 1.0, "seed": 3, "max_tokens": 8}.items()
        assert 1 <= len(found[0].origin["token_ids"]) <= 8
    assert draw(http, make(http, "pairwise"), **fields) == told  # by the same seed, the same


def test_rankings_and_single_answers(server: Server) -> None:
    http = server.http()
    ranking, thumbs = make(http, "ranking"), make(http, "thumbs")
    assert draw(http, ranking, count=4)["added"] == 2
    assert [len(candidates) for _, candidates in kept(server, ranking)] == [4, 4]
    assert draw(http, thumbs, count=3)["added"] == 6
    assert {len(candidates) for _, candidates in kept(server, thumbs)} == {1}
    shown = http.get("/v1/comparisons/next", params={"label_project_id": ranking}).json()
    assert MODEL not in json.dumps(shown)


def test_what_is_drawn_is_metered(server: Server) -> None:
    project, key = server.new_account(f"metered-{secrets.token_hex(3)}")
    http = server.http(key)
    draw(http, make(http, "edit"), count=2, prompts=["The cat"])
    [found] = rows(server, project.id, 1)
    assert (found.model, found.status) == (MODEL, "complete")
    assert 2 <= found.completion_tokens <= 16


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("pairwise", {"count": 3}, "do not go into pairs"),
        ("ranking", {"count": 1}, "a ranking has 2 to 9"),
        ("ranking", {"count": 10}, "a ranking has 2 to 9"),
        ("pairwise", {"prompts": []}, "give 1 to 100 in one call"),
        ("edit", {"prompts": ["a"] * 100, "count": 11}, "at most 1000"),
        ("pairwise", {"temperature": 0}, "No task came of it: 2 answers or pairs were the same"),
        ("pairwise", {"prompts": ["a " * 3000]}, "maximum context length"),
    ],
)
def test_draws_that_cannot_be(server: Server, kind: str, fields: Any, told: str) -> None:
    http = server.http()
    project = make(http, kind)
    assert told in draw(http, project, 400, **fields)
    assert kept(server, project) == []


def test_draws_of_what_is_not_ones_own(server: Server, adapter: str) -> None:
    http = server.http()
    project = make(http, "pairwise")
    assert "does not exist" in draw(http, project, 404, models=["ft:none"])
    other = server.http(server.new_account(f"other-{secrets.token_hex(3)}")[1])
    assert "No such labeling project" in draw(other, project, 404)
    assert "does not exist" in draw(other, make(other, "pairwise"), 404, models=[adapter])


def test_by_the_command_line(server: Server, tmp_path: Path) -> None:
    http = server.http()
    project = make(http, "pairwise")
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Say {i}", "completion": " x"} for i in range(20)]  # two requests
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    def hone(*words: str, key: str = server.key) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.cli", "feedback", "sample", project, *words]
        environment = {**os.environ, "HONE_API_KEY": key}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    given = (str(file), "--model", MODEL, "--max-tokens", "6", "--url", server.url)
    done = hone(*given, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["added"] + told["left_out"]["same"] + told["left_out"]["empty"] == 20
    assert len(kept(server, project)) == told["added"] > 0
    refused = hone(*given, key="sk-wrong")
    assert refused.returncode != 0
    assert "after 0 tasks, prompt 1 on:" in refused.stderr
    assert "No server answers" in hone(*given[:-1], "http://127.0.0.1:9").stderr
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n', "utf-8")
    assert "line 2: Give an object with 'prompt'" in hone(*given).stderr


def test_by_the_page(server: Server, adapter: str) -> None:
    account = server.project.id
    admin = person(server, account, "admin")
    project = make(server.http(), "pairwise")
    path = f"/web/projects/{project}/sample"
    assert f'name="models" value="{adapter}"' in admin.get(f"/web/projects/{project}")
    form = {"prompts": "The cat\r\n\r\nA dog", "models": [MODEL, adapter], "count": "1"}
    assert "0 of 2 tasks done" in admin.post(path, max_tokens="6", **form)
    assert [task.prompt for task, _ in kept(server, project)] == ["The cat", "A dog"]
    refused = admin.post(path, 400, max_tokens="6", **(form | {"models": []}))
    assert "Choose at least one model" in refused
    assert "The cat\n" in refused.replace("\r", "")  # what was typed is there
    assert "max_tokens" in admin.post(path, 400, max_tokens="many", **form)
    assert "into pairs" in admin.post(path, 400, max_tokens="6", **(form | {"models": [MODEL]}))
    person(server, account, "reviewer").post(path, 403, max_tokens="6", **form)


def specs(*texts: str) -> list[CandidateSpec]:
    return [CandidateSpec(text) for text in texts]


@pytest.mark.parametrize(
    ("kind", "texts", "made", "left"),
    [
        ("pairwise", "a b c c d  ", [["a", "b"]], {"same": 1, "empty": 1}),
        ("ranking", "a b a ", [["a", "b"]], {"same": 1, "empty": 1}),
        ("ranking", "a a", [], {"same": 1}),
        ("thumbs", "a a b ", [["a"], ["b"]], {"same": 1, "empty": 1}),
    ],
)
def test_answers_as_tasks(kind: str, texts: str, made: Any, left: dict[str, int]) -> None:
    left_out: Counter[str] = Counter()
    found = as_tasks(kind, "q", specs(*texts.split(" ")[:6]), left_out)
    assert [[candidate.text for candidate in task.candidates] for task in found] == made
    assert {name: count for name, count in left_out.items() if count} == left


def test_a_draw_that_is_too_large() -> None:
    with pytest.raises(InvalidInput, match="give 1 to 100"):
        check_draw("edit", 101, 1, 1)
