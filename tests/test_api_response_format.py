"""`response_format` through the official client: whole, streamed, cut, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "Which?"}]


class Pick(BaseModel):
    colour: Literal["red", "green"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("format"))) as found:
        yield found


def test_the_client_parses_its_own_type(server: Server) -> None:
    found = server.client().chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Pick, seed=1, n=3
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Pick)


def test_streams_conform(server: Server) -> None:
    schema = Pick.model_json_schema()
    stream = server.client().chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        seed=2,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    )
    text, reason = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_any_object(server: Server) -> None:
    stopped = 0
    for seed in range(12):
        answer = server.client().chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            seed=seed,
            max_tokens=400,
            response_format={"type": "json_object"},
        )
        [choice] = answer.choices
        if choice.finish_reason == "stop":
            stopped += 1
            assert isinstance(json.loads(choice.message.content or ""), dict)
    assert stopped


def test_an_answer_that_is_cut_says_so(server: Server) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        server.client().chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Pick, max_tokens=5
        )


@pytest.mark.parametrize(
    ("given", "param", "word"),
    [
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (
            {"type": "json_object", "json_schema": {"name": "a", "schema": {}}},
            "response_format.json_schema",
            "only there",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}},
            "response_format.json_schema.schema",
            "'not'",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
            "name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a"}},
            "response_format.json_schema.schema",
            "schema",
        ),
    ],
)
def test_bad_formats_are_named(server: Server, given: Any, param: str, word: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "response_format": given}
    answer = server.http().post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert word in error["message"]


def test_text_is_the_default(server: Server) -> None:
    plain = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "seed": 4}
    first, second = (
        server.http().post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        for body in (plain, {**plain, "response_format": {"type": "text"}})
    )
    assert first == second
