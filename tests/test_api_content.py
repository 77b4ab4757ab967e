"""Content control through the API: moderations, policies on what goes in and comes out."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import select

from data import accounts, content_events
from data.tables import Project
from data.tables_accounts import SafetyCase
from data.tables_jobs import WebhookDelivery
from data.tables_metering import UsageRecord

LETTERS = "ab ."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("content"))) as found:
        yield found


@pytest.fixture(scope="module")
def admin(server: Server) -> httpx.Client:
    _, key = accounts.create_admin_key(server.runtime.database)
    return server.http(key)


@pytest.fixture
def project(server: Server, request: pytest.FixtureRequest) -> tuple[Project, str]:
    return server.new_account(f"{request.node.name[:40]} {time.monotonic_ns()}")


def set_policy(admin: httpx.Client, project: Project, **values: Any) -> dict[str, Any]:
    answer = admin.post(f"/v1/organization/projects/{project.id}/content_policy", json=values)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def word(value: str, **more: str) -> dict[str, str]:
    return {"type": "word", "value": value, **more}


def exactly(text: str) -> dict[str, str]:
    return {"type": "regex", "value": re.escape(text), "name": "banned"}


def letters_only(server: Server) -> dict[str, float]:
    """A bias under which the random model writes only words of a and b, and full stops."""
    tokenizer = server.runtime.models.base_tokens.tokenizer
    return {str(tokenizer.encode(c)[0]): 100.0 for c in LETTERS}


def asked(server: Server, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 120, "seed": 3}
    return {**body, "logit_bias": letters_only(server), **more}


def test_the_official_client_reads_moderations(server: Server) -> None:
    client = server.client()
    one = client.moderations.create(input="See you at dinner")
    assert one.id.startswith("modr-")
    assert (one.model, len(one.results)) == ("hone-moderation-1", 1)
    result = one.results[0]
    assert result.flagged is False
    assert len(result.categories.model_dump(by_alias=True)) == 13
    assert 0 < result.category_scores.hate < 0.5
    assert result.category_scores.sexual == 0
    assert result.category_applied_input_types.hate == ["text"]
    many = client.moderations.create(input=["a", "b"], model="omni-moderation-latest")
    assert len(many.results) == 2
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert len(client.moderations.create(input=parts).results) == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": [1]},
        {"input": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"input": "x", "model": "gpt"},
    ],
)
def test_bad_moderations_are_named(server: Server, body: dict[str, Any]) -> None:
    answer = server.http().post("/v1/moderations", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("input", "model")


def test_input_that_is_blocked(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    shown = set_policy(admin, account, input="block", rules=[word("zorg", name="zorgs")])
    assert shown["rules"] == [{"type": "word", "value": "zorg", "name": "zorgs"}]
    client = server.client(key)
    messages: Any = [{"role": "system", "content": "a ZORG"}, {"role": "user", "content": "b"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert caught.value.code == "content_policy_violation"
    assert "request was rejected as a result of the safety system" in str(caught.value)
    ids = server.runtime.models.base_tokens.tokenizer.encode("my zorg")
    for prompt in ("my zorg", ["ok", "my zorg"], ids):
        answer = server.http(key).post("/v1/completions", json={"model": MODEL, "prompt": prompt})
        assert answer.json()["error"]["param"] == "prompt"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input="zorg")
    assert client.completions.create(model=MODEL, prompt="zorgs", max_tokens=1).choices
    events = admin.get(f"/v1/organization/projects/{account.id}/content_events").json()["data"]
    assert [event["matched"] for event in events] == [["zorgs"]] * 5
    assert "ZORG" not in json.dumps(events)
    policy = admin.get(f"/v1/organization/projects/{account.id}/content_policy").json()
    assert policy == shown


def held_back(server: Server, key: str, banned: str, **more: Any) -> list[dict[str, Any]]:
    chunks = []
    body = asked(server, stream=True, stream_options={"include_usage": True}, **more)
    with server.http(key).stream("POST", "/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
    assert "error" not in chunks[0], chunks
    return chunks


def test_blocked_output_never_leaves(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    plain = server.client(key).completions.create(**asked(server))
    text = plain.choices[0].text
    sentences = text.split(". ")
    assert len(sentences) > 3, text
    banned = max(sentences[2:-1], key=len).strip()
    assert banned
    set_policy(
        admin,
        account,
        output="block",
        rules=[{"type": "regex", "value": banned.replace(".", r"\.")}],
    )
    chunks = held_back(server, key, banned, logprobs=2)
    said = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    tokens = [
        token
        for c in chunks
        if c["choices"] and c["choices"][0]["logprobs"]
        for token in c["choices"][0]["logprobs"]["tokens"]
    ]
    assert banned not in said
    assert text.startswith(said)
    assert said, "what came before has left"
    assert "".join(tokens) == said
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][
        -1
    ] == "content_filter"
    whole = server.client(key).completions.create(**asked(server))
    assert whole.choices[0].finish_reason == "content_filter"
    assert banned not in whole.choices[0].text
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        rows = session.scalars(
            select(UsageRecord)
            .where(UsageRecord.project_id == account.id)
            .order_by(UsageRecord.seq)
        ).all()
    told = [plain.usage, chunks[-1]["usage"], whole.usage]
    counted = [u["completion_tokens"] if isinstance(u, dict) else u.completion_tokens for u in told]
    assert [row.completion_tokens for row in rows] == counted
    assert all(count > 0 for count in counted)


def test_text_that_passes_streams_whole(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    plain = server.client(key).completions.create(**asked(server, n=2))
    set_policy(admin, account, output="block", rules=[word("nothing like this")])
    chunks = held_back(server, key, "", n=2)
    for index in (0, 1):
        own = [
            c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index
        ]
        assert "".join(choice["text"] for choice in own) == plain.choices[index].text
        assert own[-1]["finish_reason"] == "length"
        assert len(own) > 2, "it left in pieces"


def test_a_blocked_choice_leaves_the_others(
    server: Server, admin: httpx.Client, project: Any
) -> None:
    account, key = project
    plain = server.client(key).completions.create(**asked(server, n=3))
    texts = [choice.text for choice in plain.choices]
    banned = next(
        s for s in texts[1].split(". ")[1:] if s and not any(s in t for t in (texts[0], texts[2]))
    )
    set_policy(
        admin,
        account,
        output="block",
        rules=[{"type": "regex", "value": banned.replace(".", r"\.")}],
    )
    found = server.client(key).completions.create(**asked(server, n=3)).choices
    assert [choice.finish_reason for choice in found] == ["length", "content_filter", "length"]
    assert [found[0].text, found[2].text] == [texts[0], texts[2]]


def test_a_request_can_only_tighten(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    messages: Any = [{"role": "user", "content": "a zorg"}]
    set_policy(admin, account, input="score", rules=[word("zorg")])
    block = {"model": "omni-moderation-latest", "policy": {"input": {"mode": "block"}}}
    create = server.client(key).chat.completions.create
    assert create(model=MODEL, messages=messages, max_tokens=2).choices
    with pytest.raises(openai.BadRequestError):
        create(model=MODEL, messages=messages, max_tokens=2, moderation=block)  # type: ignore[arg-type]
    told = create(
        model=MODEL, messages=messages, max_tokens=2, moderation={"model": "omni-moderation-latest"}
    )
    assert told.moderation is not None
    assert told.moderation.input.type == "moderation_results"
    assert len(told.moderation.output.results) == 1  # type: ignore[union-attr]
    set_policy(admin, account, input="block", rules=[word("zorg")])
    looser: Any = {"model": "hone-moderation-1", "policy": {"input": {"mode": "score"}}}
    with pytest.raises(openai.BadRequestError):
        create(model=MODEL, messages=messages, max_tokens=2, moderation=looser)
    answer = server.http(key).post(
        "/v1/completions", json={"model": MODEL, "prompt": "x", "moderation": {"model": "other"}}
    )
    assert answer.json()["error"]["param"] == "moderation.model"


def test_an_end_user_is_shut_out_and_a_case_opens(
    server: Server, admin: httpx.Client, project: Any
) -> None:
    account, key = project
    http = server.http(key)
    types = ["safety_identifier.blocked", "safety.warning_issued"]
    hook = {"name": "a", "url": "https://93.184.216.34/", "event_types": types}
    assert http.post("/v1/webhook_endpoints", json=hook).status_code == 200
    rules = [word("zorg")]
    set_policy(admin, account, input="block", rules=rules, block_user_after=2, case_after=2)
    bad = {"model": MODEL, "prompt": "zorg", "max_tokens": 1, "safety_identifier": "eve"}
    good = {**bad, "prompt": "fine"}
    assert [http.post("/v1/completions", json=bad).status_code for _ in range(2)] == [400, 400]
    refused = http.post("/v1/completions", json=good)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "safety_identifier_blocked"
    assert refused.headers["x-should-retry"] == "false"
    assert (
        http.post("/v1/completions", json={**good, "safety_identifier": "ann"}).status_code == 200
    )
    legacy = {"model": MODEL, "prompt": "fine", "max_tokens": 1, "user": "eve"}
    assert http.post("/v1/completions", json=legacy).status_code == 403
    with server.runtime.database.read() as session:
        bodies = [json.loads(d.body) for d in session.scalars(select(WebhookDelivery))]
        cases = session.scalars(select(SafetyCase).where(SafetyCase.project_id == account.id)).all()
    told = {body["type"]: body["data"] for body in bodies}
    assert told["safety_identifier.blocked"]["safety_identifier"] == "eve"
    assert told["safety_identifier.blocked"]["safety_category"] == "zorg"
    assert told["safety_identifier.blocked"]["project_id"] == account.id
    assert [case.notice for case in cases] == ["warning"]
    assert told["safety.warning_issued"] == {"id": cases[0].id}
    path = f"/v1/organization/projects/{account.id}/blocked_identifiers"
    assert [user["id"] for user in admin.get(path).json()["data"]] == ["eve"]
    assert admin.delete(f"{path}/eve").json()["deleted"] is True
    assert http.post("/v1/completions", json=good).status_code == 200
    assert admin.delete(f"{path}/eve").status_code == 404
    assert admin.post(path, json={"identifier": "bob"}).json()["reason"] == "operator"


def test_the_filter_of_2021(server: Server) -> None:
    def ask(text: str) -> Any:
        return server.client().completions.create(
            model="content-filter-alpha",
            prompt=f"<|endoftext|>{text}\n--\nLabel:",
            temperature=0,
            max_tokens=1,
            top_p=0,
            logprobs=10,
        )

    safe = ask("See you at dinner")
    assert safe.choices[0].text == "0"
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        row = session.scalars(select(UsageRecord).order_by(UsageRecord.seq.desc())).first()
    assert row is not None
    told = (safe.usage.prompt_tokens, safe.usage.completion_tokens)
    assert (row.prompt_tokens, row.completion_tokens) == told
    top = safe.choices[0].logprobs.top_logprobs[0]
    assert set(top) == {"0", "1", "2"}
    assert sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-6)
    assert safe.choices[0].logprobs.token_logprobs[0] == max(top.values())
    moderated = server.client().moderations.create(input="See you at dinner")
    assert math.exp(top["2"]) == pytest.approx(moderated.results[0].category_scores.hate)
    with pytest.raises(openai.BadRequestError, match="Label:"):
        server.client().completions.create(model="content-filter-alpha", prompt="x")


def test_what_is_moderated_is_in_the_ledger_and_free(server: Server, project: Any) -> None:
    account, key = project
    server.client(key).moderations.create(input=["abc", "de"])
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        [row] = session.scalars(
            select(UsageRecord).where(UsageRecord.project_id == account.id)
        ).all()
    assert (row.kind, row.prompt_tokens, row.prompt_cost) == ("moderations", 5, 0)


def test_bad_policies_are_named(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    path = f"/v1/organization/projects/{account.id}/content_policy"
    assert admin.post(path, json={"input": "maybe"}).json()["error"]["param"] == "input"
    wrong = admin.post(path, json={"rules": [{"type": "regex", "value": "("}]})
    assert wrong.json()["error"]["param"] == "rules[0].value"
    assert server.http(key).get(path).status_code == 403
    missing = admin.get("/v1/organization/projects/proj_no/content_policy")
    assert missing.status_code == 404


def test_events_are_paged(server: Server, admin: httpx.Client, project: Any) -> None:
    account, key = project
    set_policy(admin, account, input="score", rules=[word("zorg")])
    for _ in range(3):
        server.client(key).completions.create(model=MODEL, prompt="zorg", max_tokens=1)
    path = f"/v1/organization/projects/{account.id}/content_events"
    first = admin.get(path, params={"limit": 2}).json()
    rest = admin.get(path, params={"after": first["last_id"]}).json()
    assert (len(first["data"]), first["has_more"], len(rest["data"])) == (2, True, 1)
    assert len(content_events.list_events(server.runtime.database, account.id, 10)[0]) == 3
