"""The routes of 2020 to 2022, with the client of that time, and those of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import MODEL, Server, running, tiny_settings
from client_env import SCRIPTS, python_env, run_client
from tiny_models import tiny_tokenizer

from data import jobs
from data.tables import Job

ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n" for i in range(12)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("legacy"))) as found:
        yield found


def upload(server: Server) -> str:
    return server.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def finish(server: Server, job_id: str) -> None:
    with server.runtime.database.write() as session:
        job = session.get_one(Job, job_id)
        job.status = "succeeded"
        jobs.record_event(session, job_id, "The job has successfully completed")


# ---- engines ----


def test_engines_are_models(server: Server) -> None:
    http = server.http()
    listed = http.get("/v1/engines").json()
    assert listed["object"] == "list"
    assert [engine["id"] for engine in listed["data"]] == [MODEL]
    engine = http.get(f"/v1/engines/{MODEL}").json()
    assert (engine["object"], engine["ready"]) == ("engine", True)
    assert http.get("/v1/engines/absent").status_code == 404


def test_completions_of_an_engine(server: Server) -> None:
    body = {"prompt": "The cat", "max_tokens": 8, "temperature": 0}
    http = server.http()
    former = http.post(f"/v1/engines/{MODEL}/completions", json=body).json()
    today = http.post("/v1/completions", json={"model": MODEL, **body}).json()
    assert former["choices"] == today["choices"]
    other = http.post(f"/v1/engines/{MODEL}/completions", json={"model": "x", **body})
    assert other.json()["error"]["param"] == "model"
    streamed = http.post(f"/v1/engines/{MODEL}/completions", json={"stream": True, **body})
    assert streamed.text.endswith("data: [DONE]\n\n")


# ---- fine-tunes ----


def test_a_fine_tune_is_a_job(server: Server) -> None:
    http, file_id = server.http(), upload(server)
    made = http.post("/v1/fine-tunes", json={"training_file": file_id, "suffix": "old"}).json()
    assert (made["object"], made["status"], made["model"]) == ("fine-tune", "pending", MODEL)
    assert made["hyperparams"]["n_epochs"] == 4
    assert made["hyperparams"]["prompt_loss_weight"] == 0.01
    assert [file["id"] for file in made["training_files"]] == [file_id]
    assert made["events"][0]["object"] == "fine-tune-event"
    job = server.client().fine_tuning.jobs.retrieve(made["id"])
    assert (job.training_file, job.user_provided_suffix) == (file_id, "old")
    listed = http.get("/v1/fine-tunes").json()["data"]
    assert made["id"] in [tune["id"] for tune in listed]
    assert "events" not in listed[0]
    assert http.post(f"/v1/fine-tunes/{made['id']}/cancel").json()["status"] == "cancelled"


def test_a_fine_tune_weighs_its_prompts(server: Server) -> None:
    body = {"training_file": upload(server), "prompt_loss_weight": 0.1}
    made = server.http().post("/v1/fine-tunes", json=body).json()
    with server.runtime.database.read() as session:
        assert session.get_one(Job, made["id"]).options == {"prompt_loss_weight": 0.1}
    assert made["hyperparams"]["prompt_loss_weight"] == 0.1
    server.http().post(f"/v1/fine-tunes/{made['id']}/cancel")


CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("rows", "asked", "options"),
    [
        (ROWS, {}, {"prompt_loss_weight": 0.01}),  # the default of that time
        (ROWS, {"prompt_loss_weight": 0}, {"prompt_loss_weight": 0}),
        (ROWS, {"prompt_loss_weight": None}, {"prompt_loss_weight": 0.01}),
        (CHAT * 12, {}, {}),  # chats have no such weight
    ],
)
def test_the_weight_of_prompts_by_default(
    server: Server, rows: bytes, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    file = server.client().files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    made = server.http().post("/v1/fine-tunes", json={"training_file": file.id, **asked}).json()
    with server.runtime.database.read() as session:
        assert session.get_one(Job, made["id"]).options == options
    shown = server.http().get(f"/v1/fine-tunes/{made['id']}").json()["hyperparams"]
    assert shown["prompt_loss_weight"] == options.get("prompt_loss_weight", 0)
    server.http().post(f"/v1/fine-tunes/{made['id']}/cancel")


CLASSES = {
    "training_file": "FILE",
    "validation_file": "FILE",
    "compute_classification_metrics": True,
    "classification_n_classes": 3,
}


def test_classification_metrics_of_a_fine_tune(server: Server) -> None:
    file_id = upload(server)
    body = {**CLASSES, "training_file": file_id, "validation_file": file_id, "n_epochs": 2}
    body |= {"classification_n_classes": 2, "classification_positive_class": " a 1"}
    body["classification_betas"] = [0.5]
    made = server.http().post("/v1/fine-tunes", json=body).json()
    section = {"n_classes": 2, "positive_class": " a 1", "betas": [0.5]}
    with server.runtime.database.read() as session:
        options = session.get_one(Job, made["id"]).options
    assert options["classification"] == section
    assert options["n_evals"] == 2  # one at the end of each epoch
    shown = made["hyperparams"]
    assert shown["compute_classification_metrics"] is True
    assert {name: shown[f"classification_{name}"] for name in section} == section
    server.http().post(f"/v1/fine-tunes/{made['id']}/cancel")


@pytest.mark.parametrize("value", [False, None])
def test_no_classification_metrics_may_be_asked_for(server: Server, value: bool | None) -> None:
    body = {"training_file": upload(server), "compute_classification_metrics": value}
    answer = server.http().post("/v1/fine-tunes", json=body)
    assert answer.status_code == 200, answer.text
    server.http().post(f"/v1/fine-tunes/{answer.json()['id']}/cancel")


def test_events_of_a_fine_tune_are_streamed(server: Server) -> None:
    http = server.http()
    made = http.post("/v1/fine-tunes", json={"training_file": upload(server)}).json()
    finish(server, made["id"])
    text = http.get(f"/v1/fine-tunes/{made['id']}/events?stream=true").text
    frames = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    assert frames[-1] == "[DONE]"
    streamed = [json.loads(frame) for frame in frames[:-1]]
    assert streamed == http.get(f"/v1/fine-tunes/{made['id']}/events").json()["data"]
    assert streamed[0]["message"].startswith("Created fine-tuning job")
    assert streamed[-1]["message"] == "The job has successfully completed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "training_file"),
        ({"training_file": "file-x"}, "training_file"),
        ({"training_file": "FILE", "n_epochs": 0}, "n_epochs"),
        ({"training_file": "FILE", "prompt_loss_weight": 1.5}, "prompt_loss_weight"),
        ({"training_file": "FILE", "classification_n_classes": 2}, "classification_n_classes"),
        ({"training_file": "FILE", "compute_classification_metrics": True}, "validation_file"),
        ({**CLASSES, "classification_n_classes": None}, "classification_n_classes"),
        ({**CLASSES, "classification_n_classes": 1}, "classification_n_classes"),
        ({**CLASSES, "classification_positive_class": "a"}, "classification_positive_class"),
        ({**CLASSES, "classification_betas": [0.5]}, "classification_betas"),
        ({"training_file": "FILE", "suffix": 41 * "x"}, "suffix"),
    ],
)
def test_refused_fine_tunes(server: Server, body: dict[str, Any], param: str) -> None:
    named = {k: upload(server) if v == "FILE" else v for k, v in body.items()}
    answer = server.http().post("/v1/fine-tunes", json=named)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


# ---- the tokenizer ----


@pytest.mark.parametrize("root", ["", "/v1"])
def test_tokens_of_a_text_and_back(server: Server, root: str) -> None:
    http = server.http()
    text = "Grüße, <|im_end|> 猫"
    expected = tiny_tokenizer().encode(text)
    found = http.post(f"{root}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (found["tokens"], found["count"]) == (expected, len(expected))
    assert found["max_model_len"] == 512
    assert len(found["token_strs"]) == len(expected)
    back = http.post(f"{root}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": tiny_tokenizer().decode(expected)}
    info = http.get(f"{root}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", "<|im_start|>")
    assert "im_start" in info["chat_template"]


def test_refused_tokens(server: Server) -> None:
    http = server.http()
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"
    assert http.post("/tokenize", json={"prompt": 1}).json()["error"]["code"] == "invalid_type"
    assert http.post("/tokenize", json={"prompt": "x", "model": "absent"}).status_code == 404


# ---- the client itself ----


@pytest.mark.slow
def test_the_client_of_that_time(server: Server, tmp_path: Path) -> None:
    python = python_env("openai-0.28.1", "openai==0.28.1", "setuptools<81")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    told = run_client(
        [python, SCRIPTS / "openai_former.py", f"{server.url}/v1", server.key, MODEL, rows]
    )
    assert MODEL in told["engines"]
    assert len(set(told["texts"])) == 1
    assert told["made"]["id"] in told["listed"]
    assert told["made"]["hyperparams"]["n_epochs"] == 1
    assert told["made"]["hyperparams"]["classification_n_classes"] == 12
    assert told["events"][0].startswith("Created fine-tuning job")
    assert told["status"] == "cancelled"
    assert "does not exist" in told["missing"]
