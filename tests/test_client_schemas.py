"""Every object that the API returns, read strictly by the official client's own types.

The calls are the client's, the bodies are read as JSON into the types that it declares for them:
no missing field, no wrong type, no value outside an enumeration, and no field that OpenAI does not
have, but for EXTENSIONS. A route that the client could call and that is not called here fails the
last test.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from fake_trainer import write_adapter
from openai.types.admin.organization import AuditLogListResponse
from pydantic import BaseModel, ValidationError
from test_api_graders import CHECK, ITEM
from test_api_isolation import EVENT, ROWS, make_case, make_model
from test_api_webhooks import Receiver, receiver

from data import accounts, adapter_folders, checkpoints
from data.tables import Job

# type: fields that it does not declare; docs/api.md tells each.
EXTENSIONS: dict[str, set[str]] = {
    "page": {"object", "has_more", "first_id", "last_id"},
    "Model": {"parent", "root"},
    "FineTuningJob": {"user_provided_suffix"},
    "ChatCompletion": {
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    },
    "ChatCompletionStoreMessage": {"name"},
    "SafetyCase": {"appeal", "closed_at", "paused_jobs"},
    "Project": {"slug"},
}
OF_THE_CLIENT = {"_request_id"}  # what it adds itself
# (type, field): values that the types do not know; OpenAI's own server sends all but the last.
DEPARTURES = {
    ("Completion", "choices.finish_reason"),  # null in all chunks but the last
    ("Completion", "choices.logprobs.token_logprobs"),  # null for the first token of a prompt
    ("Completion", "choices.logprobs.top_logprobs"),
    ("SyncCursorPage[ChatCompletionStoreMessage]", "data.role"),  # `user`, `system`
    ("FineTuningJob", "status"),  # `paused`
    ("SyncCursorPage[FineTuningJob]", "data.status"),
    ("SyncConversationCursorPage[AuditLogListResponse]", "data.type"),  # hone's own events too
}
# Routes that are hone's own, or of clients older than the official one of today.
OWN_ROUTES = re.compile(
    r"/health|/metrics|/(v1/)?(tokenizer_info|tokenize|detokenize)|/v1/(engines|fine-tunes|adapters)"
    r"(/.*)?|/v1/access_requests|/v1/organization/access_requests.*|/v1/files/\{file_id\}/report"
    r"|/v1/fine_tuning/estimate|/v1/fine_tuning/jobs/\{job_id\}/examples"
    r"|/v1/(feedback|label_projects|label_rounds|label_tasks|comparisons)(/.*)?"
    r"|/v1/webhook_endpoints/\{endpoint_id\}/deliveries"
    r"|/v1/organization/projects/\{project_id\}/(warn|suspend|reinstate|caps|content_policy)"
    r"|/v1/organization/projects/\{project_id\}/(content_events|blocked_identifiers)(/.*)?"
    r"|/v1/api_keys(/.*)?|/v1/models/\{model\}/(download|bias_report)"
    r"|/v1/safety/cases/\{case_id\}/appeal|/v1/organization/safety_cases(/.*)?"
)
__all__ = ["receiver"]  # a fixture
HELLO: Any = [{"role": "user", "content": "Hello"}]


class Caller:
    """Calls through the client, and reads every body strictly."""

    def __init__(self, client: openai.OpenAI):
        self._raw = client.with_raw_response
        self.called: set[tuple[str, str]] = set()
        self.extra: set[tuple[str, str]] = set()

    def __call__(self, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method with this dotted name; returns what the client made of the body."""
        method: Any = self._raw
        for part in method_name.split("."):
            method = getattr(method, part)
        answer = method(*args, **kwargs)
        request = answer.http_request
        self.called.add((request.method, request.url.raw_path.decode().partition("?")[0]))
        parsed = answer.parse()
        if isinstance(parsed, BaseModel):
            self.read(parsed, answer.text)
        return parsed

    def read(self, parsed: BaseModel, text: str) -> None:
        """Read JSON strictly, and note fields that the type does not have."""
        try:
            parsed = type(parsed).model_validate_json(text, strict=True)
        except ValidationError as error:
            wrong = [item for item in error.errors() if _place(error, item) not in DEPARTURES]
            if wrong:
                raise
        self._note(parsed)

    def _note(self, value: Any) -> None:
        if isinstance(value, AuditLogListResponse):
            return  # what happened is told in hone's own words
        if isinstance(value, BaseModel):
            name = "page" if hasattr(value, "next_page_info") else type(value).__name__
            extra = set(value.model_extra or {}) - OF_THE_CLIENT
            self.extra |= {(name, field) for field in extra}
            for field in type(value).model_fields:
                self._note(getattr(value, field))
        elif isinstance(value, dict):
            for item in value.values():
                self._note(item)
        elif isinstance(value, list):
            for item in value:
                self._note(item)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(
        tiny_settings(tmp_path_factory.mktemp("schemas"), webhooks_allow_private=True)
    ) as found:
        yield found


@pytest.fixture(scope="module")
def call(server: Server) -> Caller:
    return Caller(server.client())


@pytest.fixture(scope="module")
def manage(server: Server) -> Caller:
    _, key = accounts.create_admin_key(server.runtime.database)
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="", admin_api_key=key, max_retries=0
    )
    return Caller(server.clients.enter_context(client))


def test_models(call: Caller, server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = make_model(server, tmp_path_factory)
    call("models.list")
    call("models.retrieve", name)
    call("fine_tuning.checkpoints.permissions.list", name)
    friend, _ = server.new_account("friend")
    shared = "fine_tuning.checkpoints.permissions"
    made = call(f"{shared}.create", name, project_ids=[friend.id])
    call(f"{shared}.list", name)
    call(f"{shared}.delete", made.data[0].id, fine_tuned_model_checkpoint=name)
    call("models.delete", name)


@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": 3, "echo": True, "n": 2, "best_of": 3}, {"prompt": [[70, 71], [72]]}],
)
def test_completions(call: Caller, fields: dict[str, Any]) -> None:
    options = {"model": MODEL, "prompt": "The cat", "max_tokens": 4} | fields
    call("completions.create", **options)
    options.pop("best_of", None)
    for chunk in call("completions.create", **options, stream=True, stream_options=USAGE):
        call.read(chunk, json.dumps(chunk.to_dict()))


USAGE: Any = {"include_usage": True}


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}])
def test_chats(call: Caller, fields: dict[str, Any]) -> None:
    options = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 4} | fields
    made = call("chat.completions.create", **options, store=True, metadata={"a": "b"})
    for chunk in call("chat.completions.create", **options, stream=True, stream_options=USAGE):
        call.read(chunk, json.dumps(chunk.to_dict()))
    stored = "chat.completions"
    call(f"{stored}.list")
    call(f"{stored}.retrieve", made.id)
    call(f"{stored}.update", made.id, metadata={"rating": "1"})
    call(f"{stored}.messages.list", made.id)
    call(f"{stored}.delete", made.id)


def test_embeddings(call: Caller) -> None:
    call("embeddings.create", model=MODEL, input=["a", "b"], encoding_format="float")


def test_moderations(call: Caller) -> None:
    call("moderations.create", input=["a", "b"], model="omni-moderation-latest")


def test_files_and_uploads(call: Caller) -> None:
    file = call("files.create", file=("rows.jsonl", ROWS), purpose="fine-tune")
    call("files.retrieve", file.id)
    call("files.list")
    call("files.content", file.id)
    call("files.delete", file.id)
    what = {"filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload = call("uploads.create", bytes=len(ROWS), **what)
    part = call("uploads.parts.create", upload.id, data=ROWS)
    call("uploads.complete", upload.id, part_ids=[part.id])
    call("uploads.cancel", call("uploads.create", bytes=9, **what).id)


def test_jobs(call: Caller, server: Server, tmp_path: Path) -> None:
    file = call("files.create", file=("rows.jsonl", ROWS), purpose="fine-tune")
    jobs = "fine_tuning.jobs"
    plain = call(f"{jobs}.create", model=MODEL, training_file=file.id)
    job = call(
        f"{jobs}.create",
        model=MODEL,
        training_file=file.id,
        validation_file=file.id,
        metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    add_checkpoint(server, job.id, tmp_path)
    call(f"{jobs}.list")
    call(f"{jobs}.list_events", job.id)
    call(f"{jobs}.checkpoints.list", job.id)
    call(f"{jobs}.pause", plain.id)
    call(f"{jobs}.resume", plain.id)
    call(f"{jobs}.cancel", plain.id)
    with server.runtime.database.write() as session:
        record = session.get_one(Job, job.id)
        record.status, record.trained_tokens = "failed", 5
        record.error = {"code": "out_of_memory", "message": "m", "param": None}
        record.hyperparameters = record.hyperparameters | {"n_epochs": 2, "batch_size": 1}
    call(f"{jobs}.retrieve", job.id)


def add_checkpoint(server: Server, job_id: str, folder: Path) -> None:
    write_adapter(folder / "adapter")
    staged = adapter_folders.stage(server.runtime.settings.adapters_dir, folder / "adapter", None)
    metrics = {"step": 2, "train_loss": 1.0, "full_valid_loss": 1.5}
    with server.runtime.database.write() as session:
        record = session.get_one(Job, job_id)
        checkpoints.add(session, record, staged, "base-x", 2, metrics)


def test_graders(call: Caller) -> None:
    graders = "fine_tuning.alpha.graders"
    call(f"{graders}.validate", grader=CHECK)
    call(f"{graders}.run", grader=CHECK, model_sample="forty two", item=ITEM)


def test_batches(call: Caller) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL}}
    good = json.dumps(line).encode()
    for content in (good, b"{}"):
        file = call("files.create", file=("b.jsonl", content), purpose="batch")
        made = call(
            "batches.create",
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            metadata={"a": "b"},
        )
        while call("batches.retrieve", made.id).status not in ("completed", "failed"):
            pass
    call("batches.list")
    again = call(
        "batches.create",
        input_file_id=file.id,
        endpoint="/v1/completions",
        completion_window="24h",
    )
    call("batches.cancel", again.id)


def test_webhooks(call: Caller, receiver: Receiver) -> None:
    call("webhooks.event_types.list")
    made = call("webhooks.create", name="a", url=receiver.url, event_types=[EVENT])
    call("webhooks.list")
    call("webhooks.retrieve", made.id)
    call("webhooks.update", made.id, name="b")
    call("webhooks.rotate_secret", made.id)
    call("webhooks.test", made.id, event_type=EVENT)
    call("webhooks.delete", made.id)


def test_safety_cases(call: Caller, server: Server) -> None:
    call("safety.cases.retrieve", make_case(server, None))


def test_accounts(manage: Caller, server: Server) -> None:
    root = "admin.organization"
    project = manage(f"{root}.projects.create", name="shown")
    manage(f"{root}.projects.update", project.id, name="renamed")
    manage(f"{root}.projects.retrieve", project.id)
    manage(f"{root}.projects.list")
    users = f"{root}.projects.service_accounts"
    made = manage(f"{users}.create", project.id, name="backend")
    manage(f"{users}.list", project.id)
    manage(f"{users}.retrieve", made.id, project_id=project.id)
    manage(f"{users}.update", made.id, project_id=project.id, name="front", role="owner")
    keys = f"{root}.projects.api_keys"
    manage(f"{keys}.list", project.id)
    manage(f"{keys}.retrieve", made.api_key.id, project_id=project.id)
    other = manage(f"{users}.create", project.id, name="other")
    manage(f"{keys}.delete", other.api_key.id, project_id=project.id)
    manage(f"{users}.delete", made.id, project_id=project.id)
    key = manage(f"{root}.admin_api_keys.create", name="second")
    manage(f"{root}.admin_api_keys.list")
    manage(f"{root}.admin_api_keys.retrieve", key.id)
    manage(f"{root}.admin_api_keys.delete", key.id)
    access = f"{root}.projects.model_permissions"
    manage(f"{access}.update", project.id, mode="allow_list", model_ids=[MODEL])
    manage(f"{access}.retrieve", project.id)
    manage(f"{access}.delete", project.id)
    manage(f"{root}.projects.archive", project.id)
    manage(f"{root}.audit_logs.list")


def test_limits_and_usage(call: Caller, manage: Caller, server: Server) -> None:
    root, project = "admin.organization", server.project.id
    limits = f"{root}.projects.rate_limits"
    [limit] = manage(f"{limits}.list_rate_limits", project).data
    manage(
        f"{limits}.update_rate_limit",
        limit.id,
        project_id=project,
        max_requests_per_1_minute=100_000,
    )
    sums: Any = {"currency": "USD", "interval": "month", "threshold_amount": 10**6}
    manage(f"{root}.spend_limit.update", **sums)
    manage(f"{root}.spend_limit.retrieve")
    manage(f"{root}.spend_limit.delete")
    spend = f"{root}.projects.spend_limit"
    manage(f"{spend}.update", project, **sums)
    manage(f"{spend}.retrieve", project)
    manage(f"{spend}.delete", project)
    alerts = f"{root}.projects.spend_alerts"
    to: Any = {"type": "email", "recipients": ["a@example.org"]}
    alert = manage(f"{alerts}.create", project, **sums, notification_channel=to)
    manage(f"{alerts}.list", project)
    manage(f"{alerts}.retrieve", alert.id, project_id=project)
    manage(f"{alerts}.update", alert.id, project_id=project, **sums, notification_channel=to)
    manage(f"{alerts}.delete", alert.id, project_id=project)
    start = int(time.time()) - 86_400
    manage(f"{root}.usage.completions", start_time=start, group_by=["project_id", "model"])
    call("embeddings.create", model=MODEL, input="a", encoding_format="float")
    call("moderations.create", input="a")
    for kind in ("embeddings", "moderations"):
        usage = f"{root}.usage.{kind}"
        found = manage(usage, start_time=start, group_by=["project_id", "model", "api_key_id"])
        assert any(bucket.results for bucket in found.data), kind
    manage(f"{root}.usage.costs", start_time=start)


def test_no_other_fields_than_the_documented(call: Caller, manage: Caller) -> None:
    found: dict[str, set[str]] = {}
    for kind, field in call.extra | manage.extra:
        found.setdefault(kind, set()).add(field)
    assert found == EXTENSIONS
    text = (Path(__file__).parents[1] / "docs/api.md").read_text("utf-8")
    missing = [name for names in EXTENSIONS.values() for name in names if f"`{name}`" not in text]
    assert missing == []


def test_every_route_of_the_client_was_called(call: Caller, manage: Caller, server: Server) -> None:
    paths = server.http().get("/openapi.json").json()["paths"]
    routes = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if not OWN_ROUTES.fullmatch(path)
    }
    called = call.called | manage.called
    assert {route for route in routes if not any(_is_of(one, route) for one in called)} == set()


def _place(error: ValidationError, found: Any) -> tuple[str, str]:
    return error.title, ".".join(part for part in found["loc"] if isinstance(part, str))


def _is_of(call: tuple[str, str], route: tuple[str, str]) -> bool:
    pattern = re.sub(r"\\{\w+\\}", r"[^/]+", re.escape(route[1]))
    return call[0] == route[0] and re.fullmatch(pattern, call[1]) is not None
