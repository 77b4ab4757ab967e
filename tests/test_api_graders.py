"""Graders through the official client, a model of the account among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from openai.types.fine_tuning.alpha import GraderRunResponse
from sqlalchemy import select
from tiny_models import tiny_model, tiny_tokenizer

from data.settings import Prices
from data.tables_metering import UsageRecord
from serve.api.generation import Answer, Generator
from serve.api.grading import FLAGS, read_score

CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
ALIKE = {
    "type": "text_similarity",
    "name": "alike",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}
JUDGE = {
    "type": "score_model",
    "name": "judge",
    "model": MODEL,
    "input": [
        {"role": "system", "content": "Give a number."},
        {"role": "user", "content": {"type": "input_text", "text": "{{ sample.output_text }}"}},
    ],
}
ITEM = {"answer": "forty two"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    prices = Prices(prompt=1, completion=2)
    with running(tiny_settings(tmp_path_factory.mktemp("graders"), prices=prices)) as found:
        yield found


@pytest.fixture
def graders(server: Server) -> Any:
    return server.client().fine_tuning.alpha.graders


def raised(run: GraderRunResponse) -> list[str]:
    errors = run.metadata.errors.model_dump(by_alias=True)
    assert set(FLAGS) <= set(errors)
    return [name for name in FLAGS if errors[name]]


@pytest.mark.parametrize(
    ("operation", "sample", "reward"),
    [
        ("eq", "forty two", 1.0),
        ("eq", "Forty two", 0.0),
        ("ne", "Forty two", 1.0),
        ("like", "It is forty two.", 1.0),
        ("like", "It is Forty two.", 0.0),
        ("ilike", "It is Forty TWO.", 1.0),
    ],
)
def test_string_check(graders: Any, operation: str, sample: str, reward: float) -> None:
    grader = CHECK | {"operation": operation}
    found = graders.run(grader=grader, model_sample=sample, item=ITEM)
    GraderRunResponse.model_validate(found.model_dump(by_alias=True), strict=True)
    assert (found.reward, found.metadata.scores, found.sub_rewards) == (
        reward,
        {"exact": reward},
        {},
    )
    assert (found.metadata.name, found.metadata.type) == ("exact", "string_check")
    assert raised(found) == []


def test_similarity(graders: Any) -> None:
    found = graders.run(grader=ALIKE, model_sample="forty too", item=ITEM)
    assert found.reward == pytest.approx(2 * 8 / 18)
    stems = graders.run(grader=ALIKE | {"evaluation_metric": "meteor"}, model_sample="x", item=ITEM)
    assert (stems.reward, raised(stems)) == (0.0, [])
    with pytest.raises(openai.BadRequestError, match="'cosine'") as caught:
        graders.run(grader=ALIKE | {"evaluation_metric": "meteors"}, model_sample="x", item=ITEM)
    assert caught.value.param == "grader.evaluation_metric"


def test_cosine_is_that_of_the_base_models_states(server: Server) -> None:
    """Against transformers: the mean of the last hidden states of each text."""
    project, key = server.new_account("cosine")
    run = server.client(key).fine_tuning.alpha.graders.run
    grader: Any = ALIKE | {"evaluation_metric": "cosine"}
    found = run(grader=grader, model_sample="forty too", item=ITEM)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    means = []
    for text in ("forty too", ITEM["answer"]):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            means.append(model.model(input_ids=ids).last_hidden_state[0].mean(0))
    expected = float(torch.cosine_similarity(*means, dim=0))
    assert found.reward == pytest.approx(expected, abs=1e-5)
    assert run(grader=grader, model_sample="forty two", item=ITEM).reward == pytest.approx(1)
    assert run(grader=grader, model_sample="", item=ITEM).reward == 0
    told = found.metadata.token_usage
    assert told == len(tokenizer.encode("forty too")) + len(tokenizer.encode("forty two"))
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        query = select(UsageRecord).where(UsageRecord.project_id == project.id)
        rows = list(session.scalars(query.order_by(UsageRecord.seq)))
    assert [(r.kind, r.model) for r in rows] == [("embeddings", MODEL)] * 2
    assert rows[0].prompt_tokens == told
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        run(grader=grader, model_sample="x" * 5000, item=ITEM)


def test_multi(graders: Any) -> None:
    multi = {
        "type": "multi",
        "name": "both",
        "graders": {"a": CHECK, "b": ALIKE},
        "calculate_output": "0.5 * a + 0.5 * b",
    }
    found = graders.run(grader=multi, model_sample="forty two", item=ITEM)
    assert (found.reward, found.sub_rewards) == (1.0, {"a": 1.0, "b": 1.0})
    divided = multi | {"calculate_output": "1 / (a - b)"}
    found = graders.run(grader=divided, model_sample="forty two", item=ITEM)
    assert (found.reward, raised(found)) == (0.0, ["other_error"])


def test_flags(graders: Any) -> None:
    missing = graders.run(grader=CHECK, model_sample="x", item={})
    assert (missing.reward, raised(missing)) == (0.0, ["invalid_variable_error"])
    parsed = CHECK | {"input": "{{ sample.output_json.v }}"}
    broken = graders.run(grader=parsed, model_sample="{", item=ITEM)
    assert raised(broken) == ["sample_parse_error"]
    good = graders.run(grader=parsed, model_sample='{"v": "forty two"}', item=ITEM)
    assert good.reward == 1.0


def test_a_model_grades(server: Server, graders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model says nonsense; what a sensible one would say is put into its mouth."""
    said = ['{"result": 0.75}']
    prompts = []
    answer = Generator.answer

    async def answer_well(self: Generator, requests: Any) -> list[Answer]:
        found = await answer(self, requests)
        prompts.extend(
            server.runtime.models.base_tokens.tokenizer.decode(r.prompt_ids) for r in requests
        )
        found[0].text = said[0]
        return found

    monkeypatch.setattr(Generator, "answer", answer_well)
    found = graders.run(grader=JUDGE, model_sample="forty two", item=ITEM)
    GraderRunResponse.model_validate(found.model_dump(by_alias=True), strict=True)
    assert (found.reward, found.metadata.sampled_model_name) == (0.75, MODEL)
    assert found.metadata.token_usage > 0
    assert found.api_model_grader_token_usage_per_model == {MODEL: found.metadata.token_usage}
    assert "user\nforty two<|im_end|>" in prompts[0]
    said[0] = "I would say 7 of 10"
    assert raised(graders.run(grader=JUDGE, model_sample="x")) == ["model_grader_parse_error"]
    ranged = JUDGE | {"range": [0, 10]}
    assert graders.run(grader=ranged, model_sample="x").reward == 7.0


def test_a_real_answer_of_the_tiny_model_is_read_or_flagged(graders: Any, server: Server) -> None:
    sampling = {"max_completions_tokens": 8, "temperature": 1.0, "seed": 3}
    found = graders.run(grader=JUDGE | {"sampling_params": sampling}, model_sample="x")
    assert raised(found) in ([], ["model_grader_parse_error"])
    assert found.metadata.token_usage > 8
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        rows = session.scalars(select(UsageRecord).order_by(UsageRecord.seq.desc()))
        used = rows.first()
        assert used is not None
    assert (used.kind, used.model, used.status) == ("completions", MODEL, "complete")
    assert used.project_id == server.project.id
    assert used.prompt_tokens + used.completion_tokens == found.metadata.token_usage
    assert used.prompt_cost + used.completion_cost > 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("0.5", 0.5),
        (" 1\n", 1.0),
        ('{"score": -2}', -2.0),
        ("score: .25!", 0.25),
        ("none", None),
        ("true", None),
        ("NaN", None),
        ("1e999", None),
    ],
)
def test_scores_are_read(text: str, score: float | None) -> None:
    assert read_score(text) == score


def test_validate(server: Server, graders: Any) -> None:
    assert graders.validate(grader=CHECK).grader.model_dump() == CHECK
    told = server.http().post("/v1/fine_tuning/alpha/graders/validate", json={"grader": JUDGE})
    assert told.json()["grader"]["range"] == [0.0, 1.0]
    with pytest.raises(openai.NotFoundError) as caught:
        graders.validate(grader=JUDGE | {"model": "gpt-9"})
    assert caught.value.code == "model_not_found"


MULTI = {"type": "multi", "name": "m", "graders": {"a": CHECK}, "calculate_output": "a"}


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({"type": "python", "name": "p", "source": "def grade(s, i): return 1"}, "grader.type"),
        ({"type": "label_model", "name": "l"}, "grader.type"),
        (CHECK | {"operation": "about"}, "grader.operation"),
        (CHECK | {"input": "{{ env.HOME }}"}, "grader.input"),
        ({**CHECK, "extra": 1}, "grader.extra"),
        ({key: CHECK[key] for key in CHECK if key != "reference"}, "grader.reference"),
        (JUDGE | {"range": [1, 0]}, "grader.range"),
        (JUDGE | {"input": []}, "grader.input"),
        (JUDGE | {"sampling_params": {"temperature": 3}}, "grader.sampling_params.temperature"),
        (MULTI | {"calculate_output": "b"}, "grader.calculate_output"),
        (MULTI | {"graders": {"a": MULTI}}, "grader.graders.a.type"),
        (MULTI | {"graders": {"a": CHECK | {"operation": "x"}}}, "grader.graders.a.operation"),
        ("exact", "grader"),
    ],
)
def test_refusals(graders: Any, grader: Any, param: str) -> None:
    for call in (
        lambda: graders.validate(grader=grader),
        lambda: graders.run(grader=grader, model_sample="x", item=ITEM),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == param
