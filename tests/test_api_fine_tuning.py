"""Fine-tuning jobs through the official client; no worker runs, so jobs stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from data import jobs
from data.tables import Job

ROWS = b"".join(
    json.dumps({"prompt": f"question {i}", "completion": f" answer {i}"}).encode() + b"\n"
    for i in range(12)
)
JOB_KEYS = {
    *("id", "object", "created_at", "finished_at", "estimated_finish", "model"),
    *("fine_tuned_model", "organization_id", "status", "training_file", "validation_file"),
    *("result_files", "hyperparameters", "method", "seed", "trained_tokens", "integrations"),
    *("metadata", "error", "user_provided_suffix"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("jobs"))) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def upload(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def create(client: openai.OpenAI, **fields: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        **({"model": MODEL, "training_file": upload(client)} | fields)
    )


def test_a_new_job_has_every_key_and_type(server: Server, client: openai.OpenAI) -> None:
    file_id = upload(client)
    job = create(client, training_file=file_id, validation_file=file_id, suffix="v1", seed=7)
    FineTuningJob.model_validate(job.model_dump(), strict=True)
    raw = server.http().get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert set(raw) == JOB_KEYS
    assert raw["id"].startswith("ftjob-")
    assert raw["hyperparameters"] == {
        "n_epochs": "auto",
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    assert raw["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": raw["hyperparameters"]},
    }
    assert (raw["status"], raw["seed"], raw["user_provided_suffix"]) == (
        "validating_files",
        7,
        "v1",
    )
    assert (raw["result_files"], raw["integrations"], raw["error"]) == ([], [], None)
    assert (raw["training_file"], raw["validation_file"]) == (file_id, file_id)
    assert isinstance(create(client).seed, int)


def test_resolved_hyperparameters_are_shown_in_both_places(
    server: Server, client: openai.OpenAI
) -> None:
    job = create(client, hyperparameters={"n_epochs": 3})
    resolved = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.5}
    with server.runtime.database.write() as session:
        session.get_one(Job, job.id).hyperparameters = resolved
    shown = client.fine_tuning.jobs.retrieve(job.id)
    FineTuningJob.model_validate(shown.model_dump(), strict=True)
    assert shown.hyperparameters.model_dump() == resolved
    assert shown.method is not None
    assert shown.method.supervised is not None
    assert shown.method.supervised.hyperparameters is not None
    assert shown.method.supervised.hyperparameters.model_dump() == resolved


def test_events_page_backwards_exactly(client: openai.OpenAI) -> None:
    job = create(client)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))  # follows every page
    for event in events:
        FineTuningJobEvent.model_validate(event.model_dump(), strict=True)
    assert [event.message for event in events] == [
        f"Validating training file: {job.training_file}",
        f"Created fine-tuning job: {job.id}",
    ]


def test_cancel(server: Server, client: openai.OpenAI) -> None:
    job = create(client)
    with pytest.raises(openai.BadRequestError, match="which has not ended"):
        client.files.delete(job.training_file)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.finished_at is not None
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "invalid_state"
    assert client.files.delete(job.training_file).deleted


def test_failed_job(server: Server, client: openai.OpenAI) -> None:
    job = create(client)
    with server.runtime.database.write() as session:
        record = session.get_one(Job, job.id)
        jobs.fail(session, record, "invalid_training_file", "Line 3 is wrong.", "training_file")
    failed = client.fine_tuning.jobs.retrieve(job.id)
    FineTuningJob.model_validate(failed.model_dump(), strict=True)
    assert failed.error is not None
    assert failed.error.model_dump() == {
        "code": "invalid_training_file",
        "message": "Line 3 is wrong.",
        "param": "training_file",
    }


def test_list_filters_by_metadata(server: Server) -> None:
    _, key = server.new_account("lister")
    client = server.client(key)
    made = [create(client, metadata={"team": team, "n": "1"}).id for team in "aab"]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert sorted(listed) == sorted(made)
    page = client.fine_tuning.jobs.list(extra_query={"metadata": {"team": "a", "n": "1"}})
    assert {job.id for job in page.data} == set(made[:2])
    assert client.fine_tuning.jobs.list(metadata={"team": "z"}).data == []
    plain = create(client).id
    page = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in page.data] == [plain]
    response = server.http(key).get("/v1/fine_tuning/jobs", params={"metadta": "x"})
    assert response.json()["error"]["code"] == "unknown_parameter"


def test_checkpoints_of_a_new_job(client: openai.OpenAI) -> None:
    assert client.fine_tuning.jobs.checkpoints.list(create(client).id).data == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-99"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"method": {"type": "rlaif"}}, "method.type"),
        ({"method": {"type": "ppo", "ppo": {}}}, "method.ppo.grader"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
            "method.supervised.hyperparameters.beta",
        ),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"integrations": [{"type": "other"}]}, "integrations[0].type"),
        ({"extra_body": {"lora": {"rank": 4}}}, "lora.rank"),
        ({"extra_body": {"epochs": 4}}, "epochs"),
    ],
)
def test_refusals(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.param == param


def test_a_rank_that_could_not_be_served(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = server.runtime.settings.model_copy(update={"max_lora_rows": 8})
    monkeypatch.setattr(server.runtime, "settings", settings)
    with pytest.raises(openai.BadRequestError, match="largest rank that this server serves, 8"):
        create(client, extra_body={"lora": {"r": 16}})
    assert create(client, extra_body={"lora": {"r": 8}}).status == "validating_files"


def test_a_file_of_another_purpose(client: openai.OpenAI) -> None:
    batch = client.files.create(file=("rows.jsonl", ROWS), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        create(client, training_file=batch.id)


def test_another_accounts_job_and_file_are_as_absent(server: Server, client: openai.OpenAI) -> None:
    job = create(client)
    _, key = server.new_account("stranger")
    with server.http(key) as http:
        for method, path in [
            ("GET", "/v1/fine_tuning/jobs/{}"),
            ("POST", "/v1/fine_tuning/jobs/{}/cancel"),
            ("GET", "/v1/fine_tuning/jobs/{}/events"),
            ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
        ]:
            absent = "ftjob-" + "0" * 24
            foreign, missing = (http.request(method, path.format(i)) for i in (job.id, absent))
            assert foreign.status_code == missing.status_code == 404
            assert foreign.text == missing.text.replace(absent, job.id)
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        body = {"model": MODEL, "training_file": job.training_file}
        foreign = http.post("/v1/fine_tuning/jobs", json=body)
        missing = http.post("/v1/fine_tuning/jobs", json=body | {"training_file": "file-0"})
        assert foreign.text == missing.text.replace("file-0", job.training_file)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
