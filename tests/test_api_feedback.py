"""Feedback and labeling over HTTP: users by the official client, labelers by their keys."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import select, update

from data import accounts
from data.feedback import privacy
from data.tables_feedback import Feedback, LabelTask

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("feedback"))) as found:
        yield found


@pytest.fixture
def account(server: Server) -> tuple[str, str]:
    """A new account, so that lists hold what the test made."""
    project, key = server.new_account(f"judged-{secrets.token_hex(4)}")
    return project.id, key


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http: httpx.Client, path: str, **body: Any) -> str:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 403, 404), answer.text
    return str(answer.json()["error"]["message"])


def rows_of(http: httpx.Client, file: Any) -> list[dict[str, Any]]:
    text = http.get(f"/v1/files/{file['id']}/content").text
    return [json.loads(line) for line in text.splitlines()]


# ---- users ----


def test_feedback_on_a_stored_chat_keeps_all_to_learn_from(
    server: Server, account: tuple[str, str]
) -> None:
    client, http = server.client(account[1]), server.http(account[1])
    chat = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=4,
        seed=1,
        store=True,
        user="ann",
        extra_body={"return_token_ids": True},
    )
    found = post(http, "/v1/feedback", completion_id=chat.id, rating=4)
    assert found["model"] == MODEL
    assert found["prompt"] == HELLO
    assert found["answer"] == chat.choices[0].message.content
    assert found["token_ids"] == chat.choices[0].token_ids  # type: ignore[attr-defined]
    assert found["request"]["seed"] == 1
    assert (found["kind"], found["rating"], found["user"]) == ("rating", 4, "ann")
    post(http, "/v1/feedback", completion_id=chat.id, correction="Good day.")
    listed = http.get("/v1/feedback", params={"limit": 1}).json()
    assert listed["has_more"]
    assert http.get(f"/v1/chat/completions/{chat.id}").json().keys().isdisjoint({"user"})
    exported = {kind: post(http, "/v1/feedback/export", kind=kind) for kind in ("sft", "unpaired")}
    assert rows_of(http, exported["unpaired"]) == [
        {
            "prompt": HELLO,
            "completion": [{"role": "assistant", "content": found["answer"]}],
            "label": 4,
        }
    ]
    (row,) = rows_of(http, exported["sft"])
    assert row["completion"] == [{"role": "assistant", "content": "Good day."}]


def test_metadata_of_the_unmodified_client_is_feedback(
    server: Server, account: tuple[str, str]
) -> None:
    client, http = server.client(account[1]), server.http(account[1])
    create = client.chat.completions.create
    chats = [
        create(model=MODEL, messages=HELLO, max_tokens=4, seed=seed, store=True) for seed in (1, 2)
    ]
    update_chat = client.chat.completions.update
    update_chat(chats[0].id, metadata={"rating": "down", "page": "7"})
    update_chat(chats[0].id, metadata={"rating": "up", "preferred_over": chats[1].id})
    update_chat(chats[1].id, metadata={"rating": "often", "preferred_over": "chatcmpl-x"})
    found = http.get("/v1/feedback").json()["data"]
    kept = sorted((one["kind"], one.get("thumb"), one["source"]) for one in found)
    assert kept == [("preference", None, "metadata"), ("rating", True, "metadata")]
    (row,) = rows_of(http, post(http, "/v1/feedback/export", kind="preference"))
    assert row["chosen"][0]["content"] == chats[0].choices[0].message.content
    assert row["rejected"][0]["content"] == chats[1].choices[0].message.content


def test_completions_are_stored_too(server: Server, account: tuple[str, str]) -> None:
    client, http = server.client(account[1]), server.http(account[1])
    extra = {"store": True, "return_token_ids": True}
    made = client.completions.create(
        model=MODEL, prompt="The cat", max_tokens=4, n=2, seed=3, user="bob", extra_body=extra
    )
    found = post(http, "/v1/feedback", completion_id=made.id, thumb=False, index=1)
    assert found["prompt"] == "The cat"
    assert found["answer"] == made.choices[1].text
    assert found["token_ids"] == made.choices[1].token_ids  # type: ignore[attr-defined]
    assert found["user"] == "bob"
    for more in ({"stream": True}, {"echo": True}, {"prompt": ["a", "b"]}):
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "store": True} | more
        assert "Invalid 'store'" in refused(http, "/v1/completions", **body)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "exactly one"),
        ({"thumb": True, "rating": 3}, "exactly one"),
        ({"rating": 6}, "1 (worst) to 5"),
        ({"correction": " "}, "better answer"),
        ({"thumb": True, "index": 1}, "has 1 choices"),
        ({"preferred_over": "chatcmpl-none"}, "No stored completion"),
    ],
)
def test_feedback_that_is_none(server: Server, said: dict[str, Any], told: str) -> None:
    create = server.client().chat.completions.create
    chat = create(model=MODEL, messages=HELLO, max_tokens=1, store=True)
    assert told in refused(server.http(), "/v1/feedback", completion_id=chat.id, **said)


def test_feedback_on_what_is_not_stored(server: Server) -> None:
    chat = server.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    told = refused(server.http(), "/v1/feedback", completion_id=chat.id, thumb=True)
    assert "store=true" in told


def test_consent_retention_and_deletion(server: Server, account: tuple[str, str]) -> None:
    client, http = server.client(account[1]), server.http(account[1])
    ids = [
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=1, store=True, user=user
        ).id
        for user in ("ann", "bob")
    ]
    for chat in ids:
        post(http, "/v1/feedback", completion_id=chat, thumb=True)
    database = server.runtime.database
    post(http, "/v1/feedback/policy", consent=True, retention_days=30)
    with database.write() as session:
        session.execute(update(Feedback).where(Feedback.end_user == "bob").values(created_at=9))
    assert privacy.expire(database) == 1
    assert [one["user"] for one in http.get("/v1/feedback").json()["data"]] == ["ann"]
    answer = http.delete("/v1/feedback/users/ann")
    assert answer.json() == {
        "object": "feedback.user.deleted",
        "user": "ann",
        "feedback": 1,
        "completions": 0,
        "chat_completions": 1,
        "tasks": 0,
    }
    assert http.get(f"/v1/chat/completions/{ids[0]}").status_code == 404
    assert http.delete("/v1/feedback/users/ann").status_code == 404
    post(http, "/v1/feedback/policy", consent=False)
    assert "consent" in refused(http, "/v1/feedback", completion_id=ids[1], thumb=True)
    client.chat.completions.update(ids[1], metadata={"rating": "up"})
    assert http.get("/v1/feedback").json()["data"] == []


# ---- labelers ----


def task(index: int) -> dict[str, Any]:
    return {
        "prompt": f"question {index}",
        "candidates": [
            {"text": f"good {index}", "model": "ft:new"},
            {"text": f"bad {index}", "model": "ft:old"},
        ],
    }


def labeler_of(server: Server, project_id: str) -> httpx.Client:
    key = accounts.create_key(server.runtime.database, project_id, role="labeler")[1]
    return server.http(key)


def test_labeling_from_project_to_training_file(server: Server, account: tuple[str, str]) -> None:
    owner = server.http(account[1])
    people = [labeler_of(server, account[0]) for _ in range(2)]
    project = post(
        owner,
        "/v1/label_projects",
        name="tone",
        kind="pairwise",
        overlap=2,
        guidelines="# Be *kind*",
    )
    path = f"/v1/label_projects/{project['id']}"
    assert post(owner, f"{path}/tasks", tasks=[task(i) for i in range(6)])["added"] == 6
    which = {"label_project_id": project["id"]}
    for number, http in enumerate(people):
        assert [one["id"] for one in http.get("/v1/comparisons").json()["data"]] == [project["id"]]
        guidelines = http.get("/v1/comparisons/guidelines", params=which).json()
        assert guidelines["text"] == "# Be *kind*"
        while shown := http.get("/v1/comparisons/next", params=which).json()["comparison"]:
            assert "ft:" not in json.dumps(shown)
            wanted = "bad" if number and shown["prompt"] == "question 3" else "good"
            letter = next(o["key"] for o in shown["options"] if o["text"].startswith(wanted))
            told = post(http, f"/v1/comparisons/{shown['id']}", choice=letter)
            assert told["counted"]
        progress = http.get("/v1/comparisons/progress", params=which).json()
        assert progress["judgements"] == 6
    report = owner.get(f"{path}/report").json()
    assert report["progress"]["done"] == 6
    assert report["raw_agreement"]["value"] == pytest.approx(5 / 6)
    assert report["alpha"]["choice"]["count"] == 6
    assert [model["model"] for model in report["models"]] == ["ft:new", "ft:old"]
    (open_task,) = owner.get(f"{path}/disagreements").json()["data"]
    assert open_task["prompt"] == "question 3"
    made = post(owner, f"{path}/export", kind="preference")
    rows = rows_of(owner, made)
    assert len(rows) == 6
    assert {row.get("label_prob") for row in rows} == {None, 0.5}
    assert not any("labeler" in row for row in rows)
    each = rows_of(owner, post(owner, f"{path}/export", kind="preference", votes="each"))
    names = [row["labeler"] for row in each]
    assert sorted(names.count(name) for name in set(names)) == [6, 6]
    (other,) = {row["labeler"] for row in each if row["chosen"].startswith("bad")}
    assert other in names
    post(owner, f"/v1/label_tasks/{open_task['id']}/settle", choice="B")
    rows = rows_of(owner, post(owner, f"{path}/export", kind="preference"))
    assert {(r["prompt"], r["chosen"]) for r in rows} == {
        (f"question {i}", f"{'bad' if i == 3 else 'good'} {i}") for i in range(6)
    }
    each = rows_of(owner, post(owner, f"{path}/export", kind="preference", votes="each"))
    assert [row["prompt"] for row in each if "labeler" not in row] == ["question 3"]  # settled
    assert owner.get(f"/v1/files/{made['id']}/report").json()["format"] == "preference"


def test_a_labelers_key_labels_for_itself_and_nothing_else(
    server: Server, account: tuple[str, str]
) -> None:
    owner, labeler = server.http(account[1]), labeler_of(server, account[0])
    project = post(owner, "/v1/label_projects", name="a", kind="pairwise")
    which = {"label_project_id": project["id"]}
    assert labeler.get(f"/v1/label_projects/{project['id']}").status_code == 403
    answer = labeler.get("/v1/comparisons/next", params=which | {"labeler": "other"})
    assert answer.status_code == 403
    answer = owner.get("/v1/comparisons/next", params=which | {"labeler": "carla"})
    assert answer.json()["comparison"] is None


def test_tasks_come_by_file(server: Server, account: tuple[str, str]) -> None:
    owner = server.http(account[1])
    rows = [
        {
            "chosen": f"\n\nHuman: hi {i}\n\nAssistant: good",
            "rejected": f"\n\nHuman: hi {i}\n\nAssistant: bad",
        }
        for i in range(3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = server.client(account[1]).files.create(file=("hh.jsonl", text), purpose="user_data")
    project = post(owner, "/v1/label_projects", name="a", kind="pairwise", gold_rate=0.5)
    path = f"/v1/label_projects/{project['id']}/tasks"
    assert post(owner, path, file_id=file.id, as_gold=True)["added"] == 3
    with server.runtime.database.read() as session:
        query = select(LabelTask).where(LabelTask.label_project_id == project["id"])
        found = session.scalars(query).all()
    assert {task.gold["choice"] for task in found if task.gold} == {0}
    assert found[0].prompt == "\n\nHuman: hi 0\n\nAssistant:"
    bad = server.client(account[1]).files.create(
        file=("bad.jsonl", b'{"prompt": "q", "candidates": ["a"], "x": 1}\n'), purpose="user_data"
    )
    assert "line 1: Unknown field 'x'" in refused(owner, path, file_id=bad.id)
    assert "either" in refused(owner, path)


def test_labelers_are_paused_and_resumed(server: Server, account: tuple[str, str]) -> None:
    owner = server.http(account[1])
    project = post(owner, "/v1/label_projects", name="a", kind="pairwise")
    path = f"/v1/label_projects/{project['id']}"
    post(owner, f"{path}/tasks", tasks=[task(0)])
    which = {"label_project_id": project["id"], "labeler": "carla"}
    shown = owner.get("/v1/comparisons/next", params=which).json()["comparison"]
    post(owner, f"/v1/comparisons/{shown['id']}", choice="A", labeler="carla")
    assert post(owner, f"{path}/labelers/carla/pause", reason="to be asked")["taken"] == 1
    answer = owner.get("/v1/comparisons/next", params=which)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "labeler_paused")
    assert post(owner, f"{path}/labelers/carla/resume")["counted"] == 1
    assert post(owner, path, status="closed")["status"] == "closed"
    answer = owner.get("/v1/comparisons/next", params=which)
    assert answer.json()["error"]["code"] == "label_project_not_open"


def test_skipping_flagging_releasing_and_amending(server: Server, account: tuple[str, str]) -> None:
    owner = server.http(account[1])
    project = post(owner, "/v1/label_projects", name="a", kind="pairwise", label={"strength": 4})
    path = f"/v1/label_projects/{project['id']}"
    post(owner, f"{path}/tasks", tasks=[task(i) for i in range(4)])
    which = {"label_project_id": project["id"]}

    def shown() -> str:
        found = owner.get("/v1/comparisons/next", params=which).json()["comparison"]
        return f"/v1/comparisons/{found['id']}"

    assert post(owner, f"{shown()}/skip", reason="hard")["kind"] == "skip"
    assert post(owner, f"{shown()}/flag", reason="an address")["kind"] == "flag"
    here = shown()
    assert post(owner, f"{here}/renew")["expires_at"] > 0
    assert post(owner, f"{here}/release")["released"]
    here = shown()
    post(owner, here, choice="A", strength=2, timings={"active_ms": 4200})
    assert "differently" in refused(owner, here, choice="B")
    post(owner, here, choice="B", strength=4, amend=True)
    (row,) = rows_of(owner, post(owner, f"{path}/export", kind="preference"))
    assert row["margin"] == 1.0
    raw = rows_of(owner, post(owner, f"{path}/export", kind="raw"))
    assert [r["kind"] for r in raw].count("answer") == 2
    assert sum(r["counts"] for r in raw) == 1
    progress = owner.get(f"{path}/progress").json()
    assert (progress["skipped"], progress["flagged"], progress["judgements"]) == (1, 1, 1)
    assert "makes no sft rows" in refused(owner, f"{path}/export", kind="sft")


def test_a_job_names_a_labeling_project(server: Server, account: tuple[str, str]) -> None:
    owner = server.http(account[1])
    project = post(owner, "/v1/label_projects", name="a", kind="pairwise")
    path = f"/v1/label_projects/{project['id']}"
    post(owner, f"{path}/tasks", tasks=[task(i) for i in range(12)])
    job = {"model": MODEL, "training_file": project["id"], "method": {"type": "dpo"}}
    assert "no judgements to export" in refused(owner, "/v1/fine_tuning/jobs", **job)
    which = {"label_project_id": project["id"]}
    while shown := owner.get("/v1/comparisons/next", params=which).json()["comparison"]:
        post(owner, f"/v1/comparisons/{shown['id']}", choice="A")
    made = post(owner, "/v1/fine_tuning/jobs", **job)
    rows = rows_of(owner, {"id": made["training_file"]})
    assert len(rows) == 12
    assert rows[0].keys() == {"prompt", "chosen", "rejected"}
    job["method"] = {"type": "supervised"}
    assert "makes no sft rows" in refused(owner, "/v1/fine_tuning/jobs", **job)
    assert "dry_run" in refused(owner, "/v1/fine_tuning/jobs", **job, dry_run=True)
    other = server.http(server.new_account(f"other-{secrets.token_hex(4)}")[1])
    assert "No such labeling project" in refused(other, "/v1/fine_tuning/jobs", **job)
