"""Another account's objects answer as absent ones, byte for byte, on every route there is.

The routes are read from the application, so a new one is tried without being named here; only a new
kind of id needs a sample.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from tiny_models import random_adapter, tiny_model

from data import registry, safety

ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n" for i in range(12)
)
TASK = {"prompt": "q", "candidates": ["a", "b"]}
OPEN = {"/health"}
EVENT = "fine_tuning.job.succeeded"
NAMES_OF_IDS = {
    "model": "model",
    "name": "model",
    "file_id": "file",
    "job_id": "job",
    "endpoint_id": "endpoint",
    "permission_id": "permission",
    "upload_id": "upload",
    "completion_id": "chat",
    "case_id": "case",
    "batch_id": "batch",
    "api_key_id": "api_key",
    "label_project_id": "label_project",
    "task_id": "label_task",
    "assignment_id": "assignment",
    "labeler": "labeler",
    "round_id": "round",
    "end_user": "end_user",
}
# For the keys of operators alone: keys of accounts are refused before any id is looked at.
OPERATORS = "/v1/organization/"
# What a route needs in its body before it looks at the id in its path.
PATH_BODIES: dict[str, dict[str, Any]] = {
    "/v1/label_projects/{label_project_id}/tasks": {"tasks": [TASK]},
    "/v1/label_projects/{label_project_id}/sample": {"prompts": ["a"], "models": [MODEL]},
    "/v1/label_tasks/{task_id}/settle": {"choice": "A"},
    "/v1/comparisons/{assignment_id}": {"choice": "A"},
    "/v1/comparisons/{assignment_id}/flag": {"reason": "a"},
    "/v1/uploads/{upload_id}/complete": {"part_ids": []},
    "/v1/webhook_endpoints/{endpoint_id}/test": {"event_type": EVENT},
    "/v1/fine_tuning/checkpoints/{model}/permissions": {"project_ids": ["proj_1"]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("isolation"))) as found:
        yield found


@pytest.fixture(scope="module")
def owned(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One object of each kind, of the first account, by kind."""
    found: dict[str, str] = {}
    for kind, make in MAKERS.items():
        found[kind] = make(server, tmp_path_factory)
    found["permission"] = make_permission(server, found["model"])
    return found


@pytest.fixture(scope="module")
def stranger(server: Server) -> httpx.Client:
    _, key = server.new_account("stranger")
    return server.http(key)


def make_file(server: Server, _: Any) -> str:
    return server.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def make_job(server: Server, scratch: Any) -> str:
    file_id = make_file(server, scratch)
    return server.client().fine_tuning.jobs.create(model=MODEL, training_file=file_id).id


def make_model(server: Server, scratch: pytest.TempPathFactory) -> str:
    folder: Path = random_adapter(tiny_model("llama"), scratch.mktemp("mine") / "a")
    fingerprint = server.runtime.models.base_fingerprint
    (folder / "hone.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    home, database = server.runtime.settings.adapters_dir, server.runtime.database
    return registry.publish(database, home, server.project, folder, MODEL, fingerprint).name


def make_endpoint(server: Server, _: Any) -> str:
    body = {"name": "a", "url": "https://93.184.216.34/", "event_types": [EVENT]}
    answer = server.http().post("/v1/webhook_endpoints", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def make_upload(server: Server, _: Any) -> str:
    create = server.client().uploads.create
    return create(bytes=9, filename="a", mime_type="a/b", purpose="user_data").id


def make_chat(server: Server, _: Any) -> str:
    messages: Any = [{"role": "user", "content": "x"}]
    create = server.client().chat.completions.create
    return create(model=MODEL, messages=messages, max_tokens=1, store=True).id


def make_case(server: Server, _: Any) -> str:
    return safety.warn(server.runtime.database, server.project.id, "Mind the rules.").id


def make_batch(server: Server, _: Any) -> str:
    client = server.client()
    file_id = client.files.create(file=("b.jsonl", b'{"a": 1}'), purpose="batch").id
    create = client.batches.create
    return create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id


def make_api_key(server: Server, _: Any) -> str:
    answer = server.http().post("/v1/api_keys", json={"name": "another"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def make_permission(server: Server, model: str) -> str:
    friend, _ = server.new_account("friend")
    path = f"/v1/fine_tuning/checkpoints/{quote(model, safe='')}/permissions"
    answer = server.http().post(path, json={"project_ids": [friend.id]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["id"])


def make_label_project(server: Server, _: Any) -> str:
    answer = server.http().post("/v1/label_projects", json={"name": "a", "kind": "pairwise"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def next_comparison(server: Server, scratch: Any) -> dict[str, Any]:
    project, http = make_label_project(server, scratch), server.http()
    added = http.post(f"/v1/label_projects/{project}/tasks", json={"tasks": [TASK]})
    assert added.status_code == 200, added.text
    found = http.get("/v1/comparisons/next", params={"label_project_id": project}).json()
    return dict(found["comparison"])


def make_round(server: Server, scratch: Any) -> str:
    project, http = make_label_project(server, scratch), server.http()
    rows = [{**TASK, "prompt": f"q {i}"} for i in range(4)]
    http.post(f"/v1/label_projects/{project}/tasks", json={"tasks": rows}).raise_for_status()
    for _ in rows:
        found = http.get("/v1/comparisons/next", params={"label_project_id": project}).json()
        shown = found["comparison"]["id"]
        http.post(f"/v1/comparisons/{shown}", json={"choice": "A"}).raise_for_status()
    answer = http.post("/v1/label_rounds", json={"label_project_id": project, "model": MODEL})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def make_label_task(server: Server, scratch: Any) -> str:
    return str(next_comparison(server, scratch)["task_id"])


def make_assignment(server: Server, scratch: Any) -> str:
    return str(next_comparison(server, scratch)["id"])


def make_end_user(server: Server, scratch: Any) -> str:
    body = {"completion_id": make_chat(server, scratch), "thumb": True, "user": "ann-of-acme"}
    assert server.http().post("/v1/feedback", json=body).status_code == 200
    return "ann-of-acme"


MAKERS: dict[str, Callable[[Server, Any], str]] = {
    "file": make_file,
    "job": make_job,
    "model": make_model,
    "endpoint": make_endpoint,
    "upload": make_upload,
    "chat": make_chat,
    "case": make_case,
    "batch": make_batch,
    "api_key": make_api_key,
    "label_project": make_label_project,
    "label_task": make_label_task,
    "round": make_round,
    "assignment": make_assignment,
    "labeler": lambda *_: "labeler-of-acme",
    "end_user": make_end_user,
}

# Bodies that name an object: (method, path, body with the object's kind in braces).
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/completions", {"model": "{model}", "prompt": "x", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": MODEL, "adapter": "{model}", "max_tokens": 1}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "{model}", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    ),
    ("POST", "/v1/fine_tuning/jobs", {"model": MODEL, "training_file": "{file}"}),
    ("POST", "/v1/fine_tuning/jobs", {"model": "{model}", "training_file": "{file}"}),
    (
        "POST",
        "/v1/batches",
        {
            "input_file_id": "{file}",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        },
    ),
    ("POST", "/v1/fine_tuning/estimate", {"model": MODEL, "training_file": "{file}"}),
    ("POST", "/v1/feedback", {"completion_id": "{chat}", "thumb": True}),
    ("POST", "/v1/label_rounds", {"label_project_id": "{label_project}", "model": MODEL}),
    ("POST", "/v1/label_rounds", {"label_project_id": "lproj-x", "model": "{model}"}),
]


def routes(server: Server) -> list[tuple[str, str]]:
    paths = server.http().get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def absent_like(known: str) -> str:
    """Return an id of the same form that no object has."""
    known_letters = string.ascii_lowercase + string.digits
    letters = str.maketrans(known_letters, known_letters[1:] + known_letters[:1])
    head, mark, tail = known.rpartition("-" if "-" in known and ":" not in known else ":")
    return head + mark + tail.translate(letters)


def told(response: httpx.Response, ids: Iterable[str]) -> tuple[int, bytes, dict[str, str]]:
    """Return all that a client could tell two answers apart by, the ids themselves blanked."""
    body = response.content
    for known in ids:
        for form in (known, quote(known, safe="")):
            body = body.replace(form.encode(), b"ID")
    skipped = {"x-request-id", "request-id", "openai-processing-ms", "date", "content-length"}
    headers = {name: value for name, value in response.headers.items() if name not in skipped}
    return response.status_code, body, headers


def test_ids_in_paths(server: Server, owned: dict[str, str], stranger: httpx.Client) -> None:
    tried = 0
    for method, path in routes(server):
        names = re.findall(r"\{(\w+)\}", path)
        if path.startswith(OPERATORS):
            filled = re.sub(r"\{\w+\}", "x", path)
            assert stranger.request(method, filled, json={}).status_code in (400, 403)
            continue
        if not names:
            continue
        unknown = [name for name in names if name not in NAMES_OF_IDS]
        assert not unknown, f"{path}: tell NAMES_OF_IDS and MAKERS what a {unknown} is"
        answers = []
        for change in (str, absent_like):
            filled = path
            ids = [change(owned[NAMES_OF_IDS[name]]) for name in names]
            for name, known in zip(names, ids, strict=True):
                filled = filled.replace("{" + name + "}", quote(known, safe=""))
            body = PATH_BODIES.get(path, {}) if method in ("POST", "PUT", "PATCH") else None
            answers.append(told(stranger.request(method, filled, json=body), ids))
        assert answers[0] == answers[1], f"{method} {path}"
        assert answers[0][0] in (400, 403, 404), f"{method} {path}: {answers[0]}"
        tried += 1
    assert tried >= 10


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_ids_in_bodies(
    server: Server, owned: dict[str, str], stranger: httpx.Client, number: int
) -> None:
    method, path, body = BODIES[number]
    answers = []
    for change in (str, absent_like):
        text = json.dumps(body)
        ids = {kind: change(known) for kind, known in owned.items()}
        for kind, known in ids.items():
            text = text.replace("{" + kind + "}", known)
        answer = stranger.request(method, path, json=json.loads(text))
        answers.append(told(answer, ids.values()))
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 404)


def test_lists_show_nothing_of_others(
    server: Server, owned: dict[str, str], stranger: httpx.Client
) -> None:
    for method, path in routes(server):
        if method == "GET" and "{" not in path:
            text = stranger.get(path).text
            assert not [known for known in owned.values() if known in text], path


def test_nothing_was_changed(server: Server, owned: dict[str, str]) -> None:
    """After all that the stranger tried, the owner finds everything as it was."""
    http = server.http()
    assert http.get(f"/v1/files/{owned['file']}").json()["status"] == "processed"
    job = http.get(f"/v1/fine_tuning/jobs/{owned['job']}").json()
    assert job["status"] not in ("cancelled", "failed", "paused")
    assert http.get(f"/v1/models/{quote(owned['model'], safe='')}").status_code == 200


BAD_REQUESTS: list[dict[str, Any]] = [
    {"content": b"{"},
    {"content": b"\xff\xfe\x00"},
    {"content": b'{"a": "\\u0000"}'},
    {"content": b"[]"},
    {"content": b"null"},
    {"content": b"{}", "headers": {"content-type": "text/plain"}},
    {"content": b"x=1", "headers": {"content-type": "application/x-www-form-urlencoded"}},
    {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    {"content": b"", "headers": {"content-type": "multipart/form-data"}},
]


def test_no_answer_without_the_envelope(server: Server) -> None:
    """Whatever is sent wherever, an error has its four keys, and no bug answers 500."""
    http = server.http()
    for method, path in routes(server):
        if path in OPEN:
            continue
        filled = re.sub(r"\{\w+\}", "absent", path)
        for other in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {method}:
            check(http.request(other, filled), f"{other} {path}")
        if method != "GET":
            for request in BAD_REQUESTS:
                headers = {"content-type": "application/json"} | request.get("headers", {})
                answer = http.request(method, filled, content=request["content"], headers=headers)
                check(answer, f"{method} {path} {request}")
    for path in (
        "/v1/files/%00",
        "/v1/models/%ff",
        "/v1/files/" + "x" * 5000,
        "/v1//files",
        "/v1/%",
    ):
        check(http.get(path), path)


def check(response: httpx.Response, what: str) -> None:
    assert response.status_code != 500, f"{what}: {response.text}"
    assert response.headers.get("x-request-id", "").startswith("req_"), what
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() >= {"message", "type", "param", "code"}, what
        assert error["message"], what
