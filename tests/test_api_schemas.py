"""Requests are read strictly, and every refusal is worded as clients expect it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from data.errors import ToolkitError
from serve.api.errors import describe
from serve.api.schemas import ChatRequest, CompletionRequest


def refusal(schema: type[BaseModel], **fields: Any) -> ToolkitError:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(fields)
    return describe(caught.value.errors())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", **fields})


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_type", "expected a number, but got a str"),
        ({"temperature": True}, "temperature", "invalid_type", "got a boolean"),
        ({"temperature": 200}, "temperature", "invalid_value", "a value <= 2, but got 200 instead"),
        ({"temperature": float("nan")}, "temperature", "invalid_type", "a finite number"),
        ({"top_p": -1.5}, "top_p", "invalid_value", "a value >= 0, but got -1.5 instead"),
        ({"n": 0}, "n", "invalid_value", "a value >= 1, but got 0 instead"),
        ({"n": 1.5}, "n", "invalid_type", "expected an integer"),
        ({"seed": 2**64}, "seed", "invalid_value", "a value < 9223372036854775808"),
        ({"logprobs": 21}, "logprobs", "invalid_value", "a value <= 20, but got 21"),
        ({"stop": 5}, "stop", "invalid_type", "a string or an array of strings"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value", "maximum length 16"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "Keys are token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "from -100 to 100"),
        ({"logit_bias": []}, "logit_bias", "invalid_type", "expected an object"),
        ({"stream": "yes"}, "stream", "invalid_type", "expected a boolean"),
        ({"temprature": 1}, "temprature", "unknown_parameter", "Did you mean 'temperature'?"),
        ({"zzz": None}, "zzz", "unknown_parameter", "Unknown parameter: 'zzz'."),
        ({"n": 3, "best_of": 2}, "best_of", "invalid_value", "a value >= 'n' (3)"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value", "'stream'"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "'stream' is enabled"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown_parameter",
            "Unknown parameter: 'stream_options.usage'. Did you mean 'include_usage'?",
        ),
    ],
)
def test_completion_refusals(fields: Any, param: str, code: str, words: str) -> None:
    error = refusal(CompletionRequest, model="m", **fields)
    assert (error.param, error.code) == (param, code)
    assert words in str(error)


def test_missing_model() -> None:
    error = refusal(CompletionRequest, prompt="x")
    assert str(error) == "Missing required parameter: 'model'."
    assert (error.param, error.code) == ("model", "missing_required_parameter")


def test_body_that_is_not_an_object() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate([1])
    assert "must be a JSON object, but is an array" in str(describe(caught.value.errors()))


def test_null_means_the_default_everywhere() -> None:
    every = dict.fromkeys(CompletionRequest.model_fields)
    body = completion(**{**every, "model": "m"})
    assert body == completion()
    assert (body.temperature, body.stop, body.logit_bias, body.best_of) == (1.0, (), {}, None)
    nested = completion(stream=True, stream_options={"include_usage": None})
    assert nested.stream_options is not None
    assert nested.stream_options.include_usage is False


def test_stop_is_one_string_or_several() -> None:
    assert completion(stop="x").stop == ("x",)
    assert completion(stop=["a", "b"]).stop == ("a", "b")


def test_chat_content_is_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": parts}]}
    )
    assert body.messages[0].content == "ab"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    unset = {"refusal": None, "annotations": None, "audio": None, "tool_calls": None}
    answers = [
        {"role": "assistant", "content": "hello", **unset},
        {"role": "assistant", "content": "hello", "annotations": []},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    body = ChatRequest.model_validate(
        {"model": "m", "messages": answers, "prompt_cache_retention": None, "service_tier": "flex"}
    )
    assert [message.content for message in body.messages] == ["hello", "hello", ""]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user", "content": 5}, "messages[0].content", "invalid_type"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        ({"role": "bot", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[0].mood", "unknown_parameter"),
        (
            {"role": "user", "content": "x", "tool_calls": [1]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
    ],
)
def test_chat_message_refusals(message: Any, param: str, code: str) -> None:
    error = refusal(ChatRequest, model="m", messages=[message])
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("name", sorted(ChatRequest.unsupported))
def test_what_chat_does_not_do_is_said(name: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    error = refusal(ChatRequest, model="m", messages=messages, **{name: [1]})
    assert (error.param, error.code) == (name, "unsupported_parameter")
