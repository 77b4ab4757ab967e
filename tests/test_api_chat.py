"""Chat completions through the official client: the template, both forms of answer, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("chat"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields
    answer: ChatCompletion = client.chat.completions.create(**options)
    ChatCompletion.model_validate(answer.model_dump())
    return answer


def test_the_conversation_is_rendered_by_the_template(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=RENDERED, max_tokens=8, temperature=0)
    answer = chat(client)
    choice = answer.choices[0]
    assert choice.message.content == plain.choices[0].text
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert choice.finish_reason == plain.choices[0].finish_reason
    assert answer.usage == plain.usage
    assert answer.id.startswith("chatcmpl-")
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    developer = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    assert chat(client, messages=developer).choices[0].message == choice.message


def test_both_names_of_the_limit(client: openai.OpenAI) -> None:
    fields = {"extra_body": {"ignore_eos": True}, "max_tokens": None}
    answer = chat(client, max_completion_tokens=3, **fields)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    whole = chat(client, **fields)
    assert whole.usage is not None
    assert whole.usage.total_tokens == 512  # without a limit, the context is the limit
    assert whole.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2, n=2).choices[1]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode("utf-8", "replace") == (
        choice.message.content
    )
    for entry in content:
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert len(entry.top_logprobs) == 2
    bare = chat(client, logprobs=True).choices[0]
    assert bare.logprobs is not None
    assert bare.logprobs.content is not None
    assert bare.logprobs.content[0].top_logprobs == []


def test_stream(client: openai.OpenAI) -> None:
    fields: Any = {"n": 2, "temperature": 1, "seed": 4, "logprobs": True}
    whole = chat(client, **fields)
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            **fields,
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert (pieces[0].delta.role, pieces[0].delta.content) == ("assistant", "")
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert pieces[-1].delta.model_dump(exclude_none=True) == {}
        assert pieces[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None
        scored = [e for p in pieces if p.logprobs for e in p.logprobs.content or []]
        assert scored == choice.logprobs.content


def test_stop_and_seed(client: openai.OpenAI) -> None:
    fields: Any = {"temperature": 1, "seed": 9}
    text = chat(client, **fields).choices[0].message.content
    assert chat(client, **fields).choices[0].message.content == text
    assert text
    cut = chat(client, stop=text[2], **fields).choices[0]
    assert cut.message.content == text[: text.index(text[2])]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_refusals(client: openai.OpenAI, fields: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_model_without_a_template(server: Server, client: openai.OpenAI) -> None:
    tokenizer = server.runtime.models.base_tokens.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client)
        assert caught.value.code == "chat_template_missing"
    finally:
        tokenizer.chat_template = template


def test_prompt_logprobs_are_those_of_the_rendered_conversation(client: openai.OpenAI) -> None:
    body = {"prompt_logprobs": 1}
    plain: Any = client.completions.create(
        model=MODEL, prompt=RENDERED, max_tokens=1, extra_body={**body, "add_special_tokens": False}
    )
    wanted = plain.choices[0].prompt_logprobs
    answer: Any = chat(client, n=2, extra_body=body)
    assert [choice.prompt_logprobs for choice in answer.choices] == [wanted, wanted]
    chunks: Any = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=3, stream=True, extra_body=body
        )
    )
    told = [getattr(choice, "prompt_logprobs", None) for c in chunks for choice in c.choices]
    assert [entry for entry in told if entry is not None] == [wanted]
    assert not hasattr(chat(client).choices[0], "prompt_logprobs")


def test_add_special_tokens_puts_them_before_the_template(client: openai.OpenAI) -> None:
    def prompt_ids(**more: Any) -> list[int]:
        answer: Any = chat(client, extra_body={"return_token_ids": True, **more})
        found: list[int] = answer.choices[0].prompt_token_ids
        return found

    completion: Any = client.completions.create(
        model=MODEL, prompt=RENDERED, max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert prompt_ids(add_special_tokens=True) == completion.choices[0].prompt_token_ids
    assert prompt_ids() == prompt_ids(add_special_tokens=False)
