"""Pause, resume, streamed events, estimates and per-row losses, through the official client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from fake_trainer import write_adapter
from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from tiny_models import tiny_tokenizer

from data import accounts, adapter_folders, checkpoints, job_lease, jobs, limits, registry, safety
from data.files import RESULTS
from data.render import render
from data.rows import PromptCompletion
from data.tables import Job
from serve.api.errors import stopping

PAIRS = [(f"question {i}", f" answer {i}") for i in range(12)]
ROWS = b"".join(
    json.dumps({"prompt": prompt, "completion": completion}).encode() + b"\n"
    for prompt, completion in PAIRS
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("control")
    with running(tiny_settings(home, prices={"training": 8.0}, keep_checkpoints=2)) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def create(client: openai.OpenAI, rows: bytes = ROWS, **fields: Any) -> FineTuningJob:
    file_id = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
    asked = {"model": MODEL, "training_file": file_id} | fields
    return client.fine_tuning.jobs.create(**asked)


def queue(server: Server, job_id: str) -> None:
    with server.runtime.database.write() as session:
        jobs.enqueue(session, session.get_one(Job, job_id), {"examples": 12})


def test_pause_and_resume(server: Server, client: openai.OpenAI) -> None:
    job = create(client)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.resume(job.id)
    assert (caught.value.code, caught.value.param) == ("invalid_state", "id")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.pause(job.id)
    assert caught.value.code == "invalid_state"
    assert job_lease.claim(server.runtime.database, "worker", 60) is None
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    told = [event.message for event in client.fine_tuning.jobs.list_events(job.id).data[::-1]]
    assert told[2:4] == ["Fine-tuning job paused", "Fine-tuning job resumed"]
    assert told[4].startswith("Job enqueued.")
    client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for verb in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError) as caught:
            verb(job.id)
        assert caught.value.code == "invalid_state"


def test_a_held_job_is_paused_at_once_and_let_go_by_its_worker(
    server: Server, client: openai.OpenAI
) -> None:
    database = server.runtime.database
    job = create(client)
    queue(server, job.id)
    while (claimed := job_lease.claim(database, "worker", 60)) is not None and claimed.id != job.id:
        pass
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert job_lease.heartbeat(database, job.id, "worker", 60) is job_lease.Standing.PAUSE
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert job_lease.claim(database, "other", 60) is None  # its worker still stops the trainer
    with database.write() as session:  # which dies instead
        session.get_one(Job, job.id).lease_expires_at = 0.0
    taken = job_lease.claim(database, "other", 60)
    assert taken is not None
    assert (taken.id, taken.pause_requested) == (job.id, False)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"  # at once
    assert job_lease.heartbeat(database, job.id, "other", 60) is job_lease.Standing.LOST


def test_streamed_events_end_with_the_job(server: Server, client: openai.OpenAI) -> None:
    job = create(client)
    frames: list[str] = []

    def read() -> None:
        path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        with server.http().stream("GET", path) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            frames.extend(line for line in response.iter_lines() if line.startswith("data: "))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.3)
    queue(server, job.id)
    time.sleep(0.7)
    client.fine_tuning.jobs.cancel(job.id)
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert frames.pop() == "data: [DONE]"
    streamed = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    listed = server.http().get(f"/v1/fine_tuning/jobs/{job.id}/events?limit=100").json()["data"]
    assert streamed == listed[::-1]
    assert streamed[-1]["message"] == "Fine-tuning job cancelled"
    with server.http() as http:
        rest = http.get(
            f"/v1/fine_tuning/jobs/{job.id}/events",
            params={"stream": "true", "after": streamed[-2]["id"]},
        ).text
        assert rest.count("data: {") == 1
        done = http.get(
            f"/v1/fine_tuning/jobs/{job.id}/events",
            params={"stream": "true", "after": streamed[-1]["id"]},
        ).text
        assert done == ": ping\n\ndata: [DONE]\n\n"
        absent = http.get("/v1/fine_tuning/jobs/ftjob-0/events?stream=true")
        assert absent.status_code == 404
        wrong = http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true&limit=3")
        assert wrong.json()["error"]["param"] == "limit"


@pytest.mark.parametrize("path", ["fine_tuning/jobs", "fine-tunes"])
def test_streamed_events_end_with_the_right_to_them(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    database, generator = server.runtime.database, server.runtime.generator
    project, key = server.new_account(f"streams {path}")
    record, second_key = accounts.create_key(database, project.id)
    job = create(server.client(key))

    def last_of(key: str, end: Callable[[], object]) -> Any:
        with server.http(key).stream("GET", f"/v1/{path}/{job.id}/events?stream=true") as response:
            lines = response.iter_lines()
            assert "error" not in next(lines)
            end()
            last = [line for line in lines if line][-1]
        return json.loads(last.removeprefix("data: "))["error"]["code"]

    with monkeypatch.context() as ending:
        told = last_of(key, lambda: ending.setattr(generator, "_stopping", stopping()))
    assert told == "server_stopping"
    assert last_of(second_key, lambda: accounts.revoke_key(database, record.id)) == (
        "invalid_api_key"
    )
    assert last_of(key, lambda: safety.suspend(database, project.id, "test")) == (
        "account_suspended"
    )


def test_an_estimate_that_tries_the_model_counts_as_a_request(server: Server) -> None:
    project, key = server.new_account("asks")
    runtime, base = server.runtime, server.runtime.models.base_model
    given = (base, runtime.settings.limits, {"requests_per_day": 1})
    limits.update_rate(runtime.database, project.id, f"rl-{base}", *given)
    runtime.gate.refresh()
    client, http = server.client(key), server.http(key)
    file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    body = {"model": MODEL, "training_file": file_id}
    answers = [http.post("/v1/fine_tuning/estimate", json=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


def test_an_estimate_counts_what_training_would_see(server: Server, client: openai.OpenAI) -> None:
    file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    tokenizer = tiny_tokenizer()
    tokens = sum(len(render(tokenizer, PromptCompletion(*pair))) for pair in PAIRS)
    body = {"model": MODEL, "training_file": file_id, "hyperparameters": {"n_epochs": 3}}
    with server.http() as http:
        found = http.post("/v1/fine_tuning/estimate", json=body).json()
        before = http.get("/v1/fine_tuning/jobs").json()["data"]
        assert (found["ok"], found["faults"], found["examples"]) == (True, [], 12)
        assert (found["tokens"], found["tokens_exact"]) == (tokens, True)
        assert (found["n_epochs"], found["trained_tokens"]) == (3, 3 * tokens)
        assert found["reports"]["training_file"]["format"] == "prompt_completion"
        assert found["speed_from"] == "probe"  # no job of this server was measured yet
        wanted = found["trained_tokens"] / found["tokens_per_s"]
        assert found["estimated_seconds"] == pytest.approx(wanted, rel=0.05, abs=0.1)
        assert found["estimated_cost"] == {"value": 3 * tokens * 8.0 / 1e6, "currency": "usd"}
        job = create(client)
        with server.runtime.database.write() as session:
            session.get_one(Job, job.id).tokens_per_s = 50.0
        dry = http.post("/v1/fine_tuning/jobs", json=body | {"dry_run": True}).json()
        assert (dry["speed_from"], dry["tokens_per_s"]) == ("jobs", 50.0)
        assert dry["estimated_seconds"] == round(3 * tokens / 50.0, 1)
        auto = http.post(
            "/v1/fine_tuning/estimate",
            json={"model": MODEL, "training_file": file_id, "max_seq_length": 10},
        ).json()
        assert (auto["n_epochs"], auto["tokens"]) == (10, 12 * 10)
        after = http.get("/v1/fine_tuning/jobs").json()["data"]
        assert len(after) == len(before) + 1
    client.fine_tuning.jobs.cancel(job.id)


def test_an_estimate_of_the_other_methods(server: Server, client: openai.OpenAI) -> None:
    tokenizer = tiny_tokenizer()

    def told(method: str, rows: list[dict[str, Any]], **section: Any) -> Any:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        body = {"model": MODEL, "training_file": file.id, "dry_run": True}
        body |= {"method": {"type": method, method: section}}
        return server.http().post("/v1/fine_tuning/jobs", json=body).json()

    def count(*pairs: tuple[str, str]) -> int:
        return sum(len(render(tokenizer, PromptCompletion(*pair))) for pair in pairs)

    pairs = [{"prompt": f"q {i}", "chosen": " yes", "rejected": f" no {i}"} for i in range(12)]
    found = told("dpo", pairs)
    both = [(row["prompt"], row[name]) for row in pairs for name in ("chosen", "rejected")]
    assert (found["ok"], found["n_epochs"], found["tokens"]) == (True, 1, count(*both))
    ranked = [{"prompt": "q", "completions": [" a", " b", " c"], "ranks": [1, 2, 2]}] * 12
    assert told("reward_model", ranked)["tokens"] == 12 * count(*[("q", f" {x}") for x in "abc"])
    judged = [{"prompt": "q", "completion": " a", "label": i % 2 == 0} for i in range(12)]
    assert told("kto", judged)["tokens"] == 12 * count(("q", " a"))
    grader = {"type": "string_check", "name": "g", "input": "{{ sample.output_text }}"}
    grader |= {"reference": "{{ item.letter }}", "operation": "like"}
    prompts = [{"prompt": f"q {i}", "letter": "a"} for i in range(12)]
    found = told("reinforcement", prompts, grader=grader)
    assert (found["ok"], found["faults"], found["examples"]) == (True, [], 12)
    assert (found["tokens"], found["estimated_cost"]) == (None, None)  # it samples what it learns


def test_an_estimate_tells_what_would_fail(server: Server, client: openai.OpenAI) -> None:
    bad = client.files.create(file=("rows.jsonl", ROWS + b'{"prompt": 1}\n'), purpose="fine-tune")
    body = {"model": MODEL, "training_file": bad.id, "dry_run": True}
    found = server.http().post("/v1/fine_tuning/jobs", json=body).json()
    assert (found["ok"], found["tokens"], found["estimated_seconds"]) == (False, None, None)
    assert "rows.jsonl:13:" in found["faults"][0]
    texts = b'{"text": "a b"}\n' * 12
    body["training_file"] = client.files.create(file=("t.jsonl", texts), purpose="fine-tune").id
    body["prompt_loss_weight"] = 0.1
    found = server.http().post("/v1/fine_tuning/jobs", json=body).json()
    assert found["ok"] is False
    assert "`prompt_loss_weight` needs" in found["faults"][0]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, training_file="file-none", extra_body={"dry_run": True})
    assert caught.value.param == "training_file"


def test_losses_of_examples(server: Server, client: openai.OpenAI) -> None:
    runtime = server.runtime
    job = create(client)
    path = f"/v1/fine_tuning/jobs/{job.id}/examples"
    with server.http() as http:
        assert http.get(path).json()["error"]["code"] == "invalid_state"
        losses = [
            {"line": line, "tokens": 30 - line, "loss": abs(5 - line) / 10} for line in range(1, 9)
        ]
        text = "".join(json.dumps(row) + "\n" for row in losses).encode()
        files = [
            runtime.files.create(server.project.id, [b"step\n"], "step_metrics.csv", RESULTS),
            runtime.files.create(server.project.id, [text], "example_losses.jsonl", RESULTS),
        ]
        queue(server, job.id)
        with runtime.database.write() as session:
            record = session.get_one(Job, job.id)
            jobs.move(session, record, "running")
            jobs.move(session, record, "succeeded", result_files=[file.id for file in files])
        worst = http.get(path, params={"sort": "-loss", "limit": 2}).json()
        ordered = [r["line"] for r in sorted(losses, key=lambda r: (-r["loss"], r["line"]))]
        assert [row["line"] for row in worst["data"]] == ordered[:2]
        assert worst["has_more"]
        more = http.get(path, params={"limit": 100, "after": worst["last_id"]}).json()
        assert [row["line"] for row in more["data"]] == ordered[2:]
        assert not more["has_more"]
        longest = http.get(path, params={"sort": "tokens", "limit": 1}).json()
        assert longest["data"][0]["line"] == 8
        assert http.get(path, params={"sort": "size"}).json()["error"]["param"] == "sort"
        _, key = server.new_account("curious")
    assert server.http(key).get(path).status_code == 404


def test_checkpoints_are_models_and_starting_points(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    runtime = server.runtime
    job = create(client, suffix="steps")
    names = []
    write_adapter(tmp_path / "adapter")
    for step in (2, 4, 6):
        staged = adapter_folders.stage(runtime.settings.adapters_dir, tmp_path / "adapter", None)
        with runtime.database.write() as session:
            record = session.get_one(Job, job.id)
            metrics = {"step": step, "full_valid_loss": 1.5}
            version = checkpoints.add(session, record, staged, "base-x", step, metrics)
            names.append(version.name)
            if step == 4:
                assert checkpoints.prune(session, job.id, 2) == []
    assert names[0].startswith(f"ft:{MODEL}:acme:steps:")
    assert names[0].endswith(":ckpt-step-2")
    registry.promote(runtime.database, server.project.id, names[0])
    with runtime.database.write() as session:  # the first is in use by the alias, so it stays
        assert checkpoints.prune(session, job.id, 1) == [names[1]]
    page = client.fine_tuning.jobs.checkpoints.list(job.id)
    for found in page.data:
        FineTuningJobCheckpoint.model_validate(found.model_dump(), strict=True)
    assert [c.fine_tuned_model_checkpoint for c in page.data] == [names[2], names[0]]
    assert [c.step_number for c in page.data] == [6, 2]
    assert page.data[0].metrics.full_valid_loss == 1.5
    models = {model.id for model in client.models.list()}
    assert {names[0], names[2], f"ft:{MODEL}:acme:steps"} <= models
    assert names[1] not in models

    for asked in (
        {"model": names[2]},
        {"model": f"ft:{MODEL}:acme:steps"},
        {"extra_body": {"from_checkpoint": names[2]}},
        {"extra_body": {"from_checkpoint": page.data[0].id}},
    ):
        made = create(client, **asked)
        with runtime.database.read() as session:
            record = session.get_one(Job, made.id)
            assert record.base == MODEL
            assert record.start_version_id is not None
        assert made.model == asked.get("model", MODEL)
    for asked, param in (
        ({"model": names[1]}, "model"),  # gone
        ({"model": names[2], "extra_body": {"lora": {"r": 4}}}, "lora.r"),
        ({"extra_body": {"from_checkpoint": "ftckpt_none"}}, "from_checkpoint"),
        ({"model": names[0], "extra_body": {"from_checkpoint": names[2]}}, "from_checkpoint"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, **asked)
        assert caught.value.param == param
    _, key = server.new_account("envious")
    texts = []
    for name in (names[2], names[2] + "9"):
        with pytest.raises(openai.BadRequestError) as caught:
            create(server.client(key), model=name)
        texts.append(caught.value.message.replace(name, "X"))
    assert texts[0] == texts[1]
