"""Completions through the official client, against transformers and PEFT on the same weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from openai.types import Completion
from tiny_models import tiny_model, tiny_tokenizer

PROMPT = "The cat"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("completions"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model("llama")


def encode(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def decode(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What transformers generates."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2
        )
    return out[0, len(ids) :].tolist()


def logprobs_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of each next token, by one plain forward pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def complete(client: openai.OpenAI, **fields: Any) -> Completion:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
    answer = client.completions.create(**options)
    if not options.get("echo"):  # the client's own type has no null for the first token
        Completion.model_validate(answer.model_dump(), strict=True)
    return answer


def test_every_form_of_prompt(client: openai.OpenAI, reference: Any) -> None:
    ids, others = encode(PROMPT), encode("dog")
    expected, other = (greedy(reference, prompt, 8) for prompt in (ids, others))
    for prompt, texts in [
        (PROMPT, [expected]),
        ([PROMPT, "dog"], [expected, other]),
        (ids, [expected]),
        ([ids, others], [expected, other]),
    ]:
        answer = complete(client, prompt=prompt, extra_body={"return_token_ids": True})
        assert [choice.token_ids for choice in answer.choices] == texts  # type: ignore[attr-defined]
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == (7 if len(texts) == 1 else 10)
        assert answer.usage.completion_tokens == sum(map(len, texts))
        assert answer.usage.total_tokens == 7 + (len(texts) - 1) * 3 + sum(map(len, texts))
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.system_fingerprint is not None


def test_no_prompt_starts_a_document(server: Server, reference: Any) -> None:
    for body in ({}, {"prompt": None}, {"prompt": ""}):
        request = {"model": MODEL, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        answer = server.http().post("/v1/completions", json=request | body).json()
        assert answer["choices"][0]["prompt_token_ids"] == [1]
        assert answer["choices"][0]["token_ids"] == greedy(reference, [1], 4)


def test_defaults(server: Server) -> None:
    answer = server.http().post(
        "/v1/completions", json={"model": MODEL, "prompt": "x", "ignore_eos": True}
    )
    assert answer.json()["usage"]["completion_tokens"] == 16
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_length_and_stop(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24, extra_body={"ignore_eos": True}).choices[0]
    assert whole.finish_reason == "length"
    stop = whole.text[5:7]
    for given in (stop, [stop], ["never there", stop]):
        cut = complete(client, max_tokens=24, stop=given, extra_body={"ignore_eos": True})
        assert cut.choices[0].text == whole.text[: whole.text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_eos_ends_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, logit_bias={"2": 100}, logprobs=0).choices[0]
    assert (answer.text, answer.finish_reason) == ("", "stop")
    assert answer.logprobs is not None
    assert answer.logprobs.tokens == ["<|im_end|>"]


def test_samples_are_grouped_by_prompt(client: openai.OpenAI) -> None:
    options = {"prompt": ["a", "b"], "n": 3, "temperature": 1, "seed": 5}
    answer = complete(client, **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts[:3])) == 3  # each sample draws its own numbers
    assert [c.text for c in complete(client, **options).choices] == texts
    alone = complete(client, **{**options, "prompt": "b"})
    assert [choice.text for choice in alone.choices] == texts[3:]  # whatever else is in the batch
    first = complete(client, **{**options, "prompt": "b", "n": 1})
    assert first.choices[0].text == texts[3]
    assert complete(client, **{**options, "seed": -7}).choices[0].text != texts[0]


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    options = {"temperature": 1, "seed": 3, "logprobs": 0}
    candidates = complete(client, n=4, **options)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = complete(client, n=2, best_of=4, **options)
    expected = sorted(candidates.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage is not None
    assert candidates.usage is not None
    assert best.usage.completion_tokens == candidates.usage.completion_tokens
    assert complete(client, best_of=2).choices[0].logprobs is None


def test_logprobs_are_the_models_own(client: openai.OpenAI, reference: Any) -> None:
    ids = encode(PROMPT)
    for fields in ({}, {"temperature": 0.5, "seed": 1, "presence_penalty": 1.5}):
        answer = complete(
            client, logprobs=3, extra_body={"return_token_ids": True}, **fields
        ).choices[0]
        found = answer.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        chosen = answer.token_ids  # type: ignore[attr-defined]
        truth = logprobs_of(reference, ids + chosen)[len(ids) - 1 : -1]
        expected = truth[range(len(chosen)), chosen].tolist()
        assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
        for top, row, value in zip(found.top_logprobs, truth, found.token_logprobs, strict=True):
            assert len(top) in (3, 4)
            assert value in top.values()
            assert sorted(top.values(), reverse=True)[:3] == pytest.approx(
                row.topk(3).values.tolist(), abs=1e-4
            )


def test_echo_scores_the_prompt_as_lm_eval_reads_it(client: openai.OpenAI, reference: Any) -> None:
    prompts = [encode("The cat sat"), encode("on")]
    answer = complete(client, prompt=prompts, max_tokens=1, logprobs=1, echo=True)
    for ids, choice in zip(prompts, answer.choices, strict=True):
        found = choice.logprobs
        assert found is not None
        for column in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset):
            assert column is not None
            assert len(column) == len(ids) + 1
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        truth = logprobs_of(reference, ids)
        expected = truth[range(len(ids) - 1), ids[1:]].tolist()
        assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        greedy_tokens = [
            max(top.values()) == value
            for top, value in zip(found.top_logprobs[1:], found.token_logprobs[1:], strict=True)
        ]
        assert greedy_tokens[:-1] == (truth[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert greedy_tokens[-1]
        assert found.text_offset == list(range(len(ids) + 1))
        assert choice.text.startswith(decode(ids))


def test_scoring_alone(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == 7
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_offsets_start_after_the_prompt_without_echo(client: openai.OpenAI) -> None:
    found = complete(client, logprobs=0).choices[0].logprobs
    assert found is not None
    assert found.text_offset is not None
    assert found.text_offset[0] == len(PROMPT)


def test_prompt_logprobs_extension(client: openai.OpenAI) -> None:
    body = {"prompt_logprobs": 1}
    choice: Any = complete(client, extra_body=body).choices[0]
    ids = encode(PROMPT)
    assert choice.prompt_logprobs[0] is None
    for token_id, entry in zip(ids[1:], choice.prompt_logprobs[1:], strict=True):
        assert entry[str(token_id)]["logprob"] <= 0


def stream_of(client: openai.OpenAI, **fields: Any) -> list[Completion]:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
    return list(client.completions.create(stream=True, **options))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True, "logprobs": 2},
        {"n": 3, "temperature": 1, "seed": 1, "logprobs": 0},
        {"prompt": ["a", "b"], "n": 2, "temperature": 1, "seed": 2, "stop": ["e", "a"]},
    ],
)
def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI, fields: Any) -> None:
    whole = complete(client, **fields)
    chunks = stream_of(client, stream_options={"include_usage": True}, **fields)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces] == [
            *[None] * (len(pieces) - 1),
            choice.finish_reason,
        ]
        if choice.logprobs is not None:
            for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [x for piece in pieces for x in getattr(piece.logprobs, column)]
                assert joined == getattr(choice.logprobs, column), column


def test_a_stream_has_no_empty_chunks(client: openai.OpenAI) -> None:
    half = str(encode("é")[0])  # a byte that begins a character: nothing to tell yet
    chunks = stream_of(client, logit_bias={half: 100})
    assert all(chunk.choices[0].text or chunk.choices[0].finish_reason for chunk in chunks[1:])


def test_stream_without_usage_has_no_usage(server: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2, "stream": True}
    text = server.http().post("/v1/completions", json=body).text
    assert "usage" not in text
    assert text.endswith("data: [DONE]\n\n")


def test_context(client: openai.OpenAI) -> None:
    for fields in ({"prompt": "x" * 600}, {"max_tokens": 506}, {"prompt": [5] * 513}):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, **fields)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "prompt"
        assert "This model's maximum context length is 512 tokens" in caught.value.message
        assert "prompt is too long" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"prompt": [10**6]}, "prompt", "invalid_value"),
        ({"prompt": [[1], []]}, "prompt", "invalid_type"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens", "invalid_value"),
        ({"best_of": 2, "n": 3}, "best_of", "invalid_value"),
    ],
)
def test_refusals(client: openai.OpenAI, fields: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_missing_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, model="gpt-99")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] == (
        "The model `gpt-99` does not exist or you do not have access to it."
    )


def test_a_client_that_leaves_frees_the_engine(server: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())
    deadline = time.monotonic() + 10
    while server.runtime.engine.stats()["requests_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
