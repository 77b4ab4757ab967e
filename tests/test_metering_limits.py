"""Rate limits, spend limits, alerts and caps over HTTP, with the official client."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError
from sqlalchemy import select

from data import accounts, webhooks
from data.settings import Limits, Prices
from data.tables_jobs import WebhookDelivery

DEFAULTS = Limits(requests_per_minute=100, tokens_per_minute=5000)
PRICES = Prices(prompt=1000.0, cached=1000.0, completion=1000.0)  # a tenth of a cent a token


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = tiny_settings(
        tmp_path_factory.mktemp("limits"), limits=DEFAULTS, prices=PRICES, min_examples=1
    )
    with running(settings) as server:
        yield server


@pytest.fixture(scope="module")
def admin(server: Server) -> Any:
    _, key = accounts.create_admin_key(server.runtime.database)
    client = OpenAI(base_url=f"{server.url}/v1", api_key=key, admin_api_key=key, max_retries=0)
    return server.clients.enter_context(client).admin.organization.projects


def ask(client: OpenAI, max_tokens: int = 2, **fields: Any) -> Any:
    return client.completions.create(model=MODEL, prompt="abc", max_tokens=max_tokens, **fields)


def test_rate_limits_are_listed_changed_and_hold_at_once(server: Server, admin: Any) -> None:
    project, key = server.new_account("rates")
    client = server.client(key)
    (limit,) = admin.rate_limits.list_rate_limits(project.id).data
    assert (limit.id, limit.model, limit.max_requests_per_1_minute) == (f"rl-{MODEL}", MODEL, 100)
    assert limit.max_requests_per_1_day == 2**31 - 1  # no limit
    ask(client)
    changed = admin.rate_limits.update_rate_limit(
        limit.id, project_id=project.id, max_requests_per_1_minute=3
    )
    assert type(changed).__name__ == "ProjectRateLimit"
    assert changed.max_tokens_per_1_minute == 5000
    ask(client)
    ask(client)
    with pytest.raises(RateLimitError) as caught:
        ask(client)
    error = caught.value
    assert (error.type, error.code, error.param) == ("requests", "rate_limit_exceeded", None)
    headers = error.response.headers
    assert 1 <= int(headers["retry-after"]) <= 20
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimitError) as caught:
        client.moderations.create(input="hello")
    assert caught.value.response.headers["x-ratelimit-limit-requests"] == "3"
    ask(server.client(server.new_account("rates-other")[1]))  # others are not concerned
    admin.rate_limits.update_rate_limit(
        limit.id, project_id=project.id, max_requests_per_1_minute=2**31 - 1
    )
    assert "x-ratelimit-limit-requests" not in answer_headers(client)


def answer_headers(client: OpenAI, **fields: Any) -> Any:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="abc", max_tokens=3, **fields
    )
    return raw.headers


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_reserved_told_and_given_back(server: Server, admin: Any, stream: bool) -> None:
    project, key = server.new_account(f"tokens {stream}")
    client = server.client(key)
    admin.rate_limits.update_rate_limit(
        f"rl-{MODEL}", project_id=project.id, max_tokens_per_1_minute=100
    )
    with client.chat.completions.with_streaming_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a"}],
        max_tokens=20,
        n=2,
        logit_bias={"2": 100},  # ends at once
        extra_body={"stream": stream},
    ) as response:
        headers = response.headers
        response.read()
    assert headers["x-ratelimit-limit-tokens"] == "100"
    reserved = 100 - int(headers["x-ratelimit-remaining-tokens"])
    assert reserved > 40  # prompt and twice the most
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
    assert headers["x-ratelimit-limit-requests"] == "100"
    later = answer_headers(client)
    left = int(later["x-ratelimit-remaining-tokens"])
    assert left > 100 - reserved  # the unused came back
    with pytest.raises(RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 300, max_tokens=1)
    assert caught.value.type == "tokens"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_rate_limits_of_what_does_not_exist(server: Server, admin: Any) -> None:
    project, _ = server.new_account("absent")
    with pytest.raises(NotFoundError):
        admin.rate_limits.list_rate_limits("proj_none")
    for rate_id in ("rl-ft:x:y:z:1", "nonsense"):
        with pytest.raises(NotFoundError):
            admin.rate_limits.update_rate_limit(
                rate_id, project_id=project.id, max_requests_per_1_minute=1
            )
    with pytest.raises(BadRequestError) as caught:
        admin.rate_limits.update_rate_limit(
            f"rl-{MODEL}", project_id=project.id, max_images_per_1_minute=1
        )
    assert caught.value.code == "unsupported_parameter"


def test_spend_limit_stops_and_alert_tells_once(
    server: Server, admin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    project, key = server.new_account("money")
    client = server.client(key)
    webhooks.create(
        server.runtime.database,
        project.id,
        "money",
        "http://127.0.0.1:9/x",
        ["spend_alert.reached"],
        allow_private=True,
    )
    alert = admin.spend_alerts.create(
        project.id,
        currency="USD",
        interval="month",
        threshold_amount=1,
        notification_channel={"type": "email", "recipients": ["ops@example.com"]},
    )
    assert admin.spend_alerts.retrieve(alert.id, project_id=project.id) == alert
    assert [a.id for a in admin.spend_alerts.list(project.id)] == [alert.id]
    limit = admin.spend_limit.update(
        project.id, currency="USD", interval="month", threshold_amount=3
    )
    assert limit.enforcement.status == "inactive"
    with caplog.at_level(logging.WARNING, "hone.metering"):
        spent = 0
        while spent < 30:  # tenths of a cent
            spent += ask(client).usage.total_tokens
        with pytest.raises(RateLimitError) as caught:
            ask(client)
        time.sleep(1.5)
    told = [line for line in caplog.messages if alert.id in line]
    assert len(told) == 1
    assert "ops@example.com" in told[0]
    with server.runtime.database.read() as session:
        [sent] = session.scalars(select(WebhookDelivery)).all()
    event = json.loads(sent.body)
    assert event["type"] == "spend_alert.reached"
    assert event["data"] | {"spent_amount": 0} == {
        "id": alert.id,
        "threshold_amount": 1,
        "spent_amount": 0,
        "currency": "USD",
    }
    assert 1 <= event["data"]["spent_amount"] <= 3
    error = caught.value
    assert (error.type, error.code) == ("insufficient_quota", "insufficient_quota")
    assert "You exceeded your current quota: " in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert admin.spend_limit.retrieve(project.id).enforcement.status == "enforcing"
    with pytest.raises(RateLimitError):
        client.fine_tuning.jobs.create(model=MODEL, training_file="file-x")
    assert client.moderations.create(input="hello").results  # what is free goes on
    line = {"custom_id": "1", "method": "POST", "url": "/v1/moderations", "body": {"input": "a"}}
    content = json.dumps(line).encode()
    file = client.files.create(file=("batch.jsonl", content), purpose="batch")
    asked: Any = {"input_file_id": file.id, "completion_window": "24h"}
    assert client.batches.create(endpoint="/v1/moderations", **asked).id
    with pytest.raises(RateLimitError):
        client.batches.create(endpoint="/v1/completions", **asked)
    grader: Any = {"type": "string_check", "name": "same", "input": "a", "reference": "a"}
    run = client.fine_tuning.alpha.graders.run
    assert run(grader=grader | {"operation": "eq"}, model_sample="a").reward == 1
    asking: Any = {"type": "score_model", "name": "judge", "model": MODEL}
    asking |= {"input": [{"role": "user", "content": "a"}]}
    with pytest.raises(RateLimitError):
        run(grader=asking, model_sample="a")
    assert admin.spend_limit.delete(project.id).deleted
    ask(client)
    with pytest.raises(NotFoundError):
        admin.spend_limit.retrieve(project.id)
    assert admin.spend_alerts.delete(alert.id, project_id=project.id).deleted
    other, _ = server.new_account("money-other")
    with pytest.raises(NotFoundError):
        admin.spend_alerts.retrieve(alert.id, project_id=other.id)


def test_caps_on_jobs_and_bytes(server: Server) -> None:
    project, key = server.new_account("caps")
    client = server.client(key)
    _, admin_key = accounts.create_admin_key(server.runtime.database)
    http = server.http(admin_key)
    path = f"/v1/organization/projects/{project.id}/caps"
    assert http.get(path).json()["max_stored_bytes"] is None
    lines = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"
    content = lines * 20
    http.post(
        path, json={"max_concurrent_jobs": 1, "max_stored_bytes": len(content) + 10}
    ).raise_for_status()
    name = ("x.jsonl", io.BytesIO(content))
    file = client.files.create(file=name, purpose="fine-tune")
    with pytest.raises(RateLimitError) as caught:
        client.files.create(file=("y.jsonl", io.BytesIO(lines)), purpose="fine-tune")
    assert caught.value.code == "insufficient_quota"
    blobs = list((server.runtime.settings.files_dir / project.id).iterdir())
    assert len(blobs) == 1  # nothing is left of the refused one
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    with pytest.raises(RateLimitError):
        client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    client.fine_tuning.jobs.cancel(job.id)
    client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    assert http.delete(path).json()["deleted"] is True
    client.files.create(file=("y.jsonl", io.BytesIO(lines)), purpose="fine-tune")
