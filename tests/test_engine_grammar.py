"""Answers within a JSON schema, held against jsonschema's own validator over random schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer

from data.errors import InvalidInput
from serve.engine.base import Completion, GenerationRequest, SamplingParams
from serve.engine.grammar import Grammars, compile_schema
from serve.engine.local import EngineConfig, LocalEngine

NUM_SCHEMAS = 60
PROMPT = tuple(range(40, 48))


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    config = EngineConfig(max_batch=8, max_context=512, kv_budget_bytes=32 << 20)
    with LocalEngine(tiny_model("llama"), tiny_tokenizer(), config) as found:
        yield found


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A satisfiable schema whose instances are short, of the keywords that people use."""
    kinds = ["string", "enum", "const", "integer", "number", "boolean", "null", "pattern", "format"]
    if depth < 2:
        kinds += ["object", "object", "array", "anyOf"]
    kind = "object" if depth == 0 else draw.choice(kinds)
    if kind == "object":
        names = [f"k{i}" for i in range(draw.randint(1, 3))]
        required = [name for name in names if draw.random() < 0.7]
        properties = {name: random_schema(draw, depth + 1) for name in names}
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        low = draw.randint(0, 2)
        items = random_schema(draw, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}
    low = draw.randint(-50, 50)
    simple: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": draw.randint(0, 2), "maxLength": 6},
        "enum": {"enum": draw.sample(["red", "grün", 3, None, True, [1], {"a": "b"}], 3)},
        "const": {"const": draw.choice(["fixed", 7, {"x": [1, 2]}])},
        "integer": {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 90)},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": low + 3.5},
        "boolean": {"type": "boolean"},
        "null": {"type": ["null", "boolean"]},
        "pattern": {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"},
        "format": {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4"])},
    }
    return simple[kind]


def request(name: str, schema: Any, **params: Any) -> GenerationRequest:
    values = {"max_tokens": 400, "seed": 5, "json_schema": json.dumps(schema), **params}
    return GenerationRequest(name, PROMPT, SamplingParams(**values))


def check(schema: dict[str, Any], completion: Completion) -> None:
    value = json.loads(completion.text)
    jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).validate(value)


def test_every_answer_that_stops_conforms(engine: LocalEngine) -> None:
    draw = random.Random(7)
    schemas = [random_schema(draw) for _ in range(NUM_SCHEMAS)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    requests = [request(f"r{i}", schema, seed=i) for i, schema in enumerate(schemas)]
    answers = engine.generate(requests)
    stopped = 0
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "stop":
            stopped += 1
            assert answer.token_ids[-1] == EOS_ID
            check(schema, answer)
    assert stopped >= 50, f"only {stopped} of {NUM_SCHEMAS} came to an end"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"top_k": 3},
        {"top_p": 0.5, "min_p": 0.1},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.5},
        {"logit_bias": {EOS_ID: 100.0}},
        {"logit_bias": {93: -100.0}},
    ],
    ids=str,
)
def test_sampling_parameters_keep_the_schema(engine: LocalEngine, params: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 999},
            "b": {"enum": [1, 2]},
        },
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    [answer] = engine.generate([request("p", schema, **params)])
    assert answer.finish_reason == "stop"
    check(schema, answer)


def test_alone_and_in_a_mixed_batch_alike(engine: LocalEngine) -> None:
    draw = random.Random(3)
    requests = [request(f"a{i}", random_schema(draw), seed=i) for i in range(4)]
    free = [
        GenerationRequest(f"f{i}", PROMPT, SamplingParams(max_tokens=60, seed=i)) for i in range(4)
    ]
    alone = [engine.generate([one])[0] for one in (*requests, *free)]
    mixed = engine.generate([one for pair in zip(requests, free, strict=True) for one in pair])
    assert [answer.token_ids for answer in alone[:4]] == [a.token_ids for a in mixed[0::2]]
    assert [answer.token_ids for answer in alone[4:]] == [a.token_ids for a in mixed[1::2]]


def test_a_cut_answer_is_the_start_of_a_valid_one(engine: LocalEngine) -> None:
    schema = {"type": "array", "items": {"enum": ["aaaaaaaaaa"]}, "minItems": 5, "maxItems": 5}
    [cut] = engine.generate([request("c", schema, max_tokens=20)])
    [whole] = engine.generate([request("w", schema)])
    assert cut.finish_reason == "length"
    assert whole.text.startswith(cut.text)
    check(schema, whole)


def test_logprobs_are_the_models_own(engine: LocalEngine) -> None:
    """The mask changes the choice, not what is told of the model's distribution."""
    [answer] = engine.generate([request("l", {"type": "boolean"}, logprobs=2, temperature=0)])
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *answer.token_ids[:-1]]])).logits[0]
    expected = torch.log_softmax(logits[len(PROMPT) - 1 :].float(), -1)
    for row, entry, token in zip(expected, answer.logprobs, answer.token_ids, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert answer.text in ("true", "false")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}, "'if', 'then'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {"type": "string"}}, "'contains'"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "string", "description": "x" * 70000}, "characters"),
        ([], "object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_enforced_is_named(schema: Any, word: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        compile_schema(json.dumps(schema))
    assert word in caught.value.message


def test_minimum_tokens_and_schemas_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="min_tokens"):
        SamplingParams(json_schema="{}", min_tokens=2)
    with pytest.raises(InvalidInput, match="ignore_eos"):
        SamplingParams(json_schema="{}", ignore_eos=True)


@pytest.mark.parametrize("vocab_size", [259, 300])
def test_masks_by_hand(vocab_size: int) -> None:
    """Of `true` or `false`, only t and f can begin; ids beyond the vocabulary never can."""
    tokenizer = tiny_tokenizer()
    parser = Grammars(tokenizer, vocab_size, frozenset({EOS_ID})).parser('{"type": "boolean"}')

    def allowed() -> set[int]:
        logits = parser.mask(torch.zeros(vocab_size), frozenset({EOS_ID, 0}))
        return {i for i, value in enumerate(logits.tolist()) if value == 0}

    first = allowed()
    t, f = (tokenizer.encode(c)[0] for c in "tf")
    assert {t, f} <= first
    assert EOS_ID not in first
    for token in tokenizer.encode("true"):
        assert token in allowed()
        parser.accept(token)
    assert allowed() >= {EOS_ID, 0}
