"""Reward models at serving time: their scores are those of `rlhf`, and the best candidates win."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from peft import PeftModel
from sqlalchemy import select
from test_api_isolation import make_model
from test_rlhf_reward import vowel_rows, words, write
from tiny_models import EOS_ID, tiny_tokenizer

from data import limits, registry
from data.render import render_prompt
from data.rows import Message
from data.tables_metering import UsageRecord
from rlhf import reward
from rlhf.actor_critic import REWARD, ActorCritic
from rlhf.comparisons import load_comparisons
from rlhf.reward_model import read_head
from serve.engine import base_model

CHATS = [
    {
        "messages": [{"role": "user", "content": f"say {number}"}],
        "chosen": [{"role": "assistant", "content": "a" * (number + 1)}],
        "rejected": [{"role": "assistant", "content": "bc" * (number + 1)}],
    }
    for number in range(4)
]
SAMPLED: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 1.0, "seed": 11}
Score = Callable[[Sequence[Sequence[int]]], list[float]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("rewards"))) as found:
        yield found


@pytest.fixture(scope="module")
def folder(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that `rlhf.reward` trained on the server's base."""
    place = tmp_path_factory.mktemp("trained")
    write(place / "pairs.jsonl", vowel_rows())
    base = server.runtime.settings.model
    assert reward.main(words(place, "run", base_model=base, num_epochs=1, dtype="float32")) == 0
    return place / "run" / "adapter"


@pytest.fixture(scope="module")
def judge(server: Server, folder: Path) -> str:
    """The same as a model of the account, published as its job does."""
    catalog, settings = server.runtime.models, server.runtime.settings
    return registry.publish(
        server.runtime.database,
        settings.adapters_dir,
        server.project,
        folder,
        MODEL,
        catalog.base_fingerprint,
        suffix="judge",
        lineage={"kind": "reward_model"},
    ).name


@pytest.fixture(scope="module")
def score(server: Server, folder: Path) -> Score:
    """The scores that PPO gets: those of transformers, PEFT and the head."""
    base, _ = base_model.load(Path(server.runtime.settings.model), "float32", "cpu")
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=REWARD)
    roles = ActorCritic(model, 1.0)
    head = read_head(folder, server.runtime.models.base_fingerprint)
    roles.add_head(REWARD, head.weight)

    def scores(rows: Sequence[Sequence[int]]) -> list[float]:
        with torch.no_grad():
            return [float(head.normalizer.apply(roles.rewards([row]))) for row in rows]

    return scores


# ---- the grader ----


def grade(server: Server, judge: str, item: dict[str, Any], sample: str, **fields: Any) -> Any:
    grader: Any = {"type": "score_model", "name": "g", "model": judge, **fields}
    run = server.client().fine_tuning.alpha.graders.run
    return run(grader=grader, model_sample=sample, item=item)


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_a_grader_scores_as_the_trainer(
    server: Server, judge: str, score: Score, tmp_path: Path, kind: str
) -> None:
    rows: list[Any] = vowel_rows(6) if kind == "texts" else CHATS
    named = [
        row if kind == "texts" else {**row, "prompt": row["messages"], "messages": None}
        for row in rows
    ]
    kept = [{key: value for key, value in row.items() if value is not None} for row in named]
    path = write(tmp_path / "pairs.jsonl", kept)
    groups = load_comparisons(path, tiny_tokenizer(), 1).groups
    expected = {tuple(ids): score([ids])[0] for group in groups for ids in group.answers}
    found = []
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            text = answer if kind == "texts" else answer[0]["content"]
            told = grade(server, judge, row, text)
            assert not any(v for k, v in told.metadata.errors.to_dict().items() if "error" in k)
            assert told.model_grader_token_usage_per_model[judge] > 0
            found.append(told.reward)
    assert sorted(found) == pytest.approx(sorted(expected.values()), abs=1e-3)
    assert len(set(found)) > 3


def test_a_reward_model_beside_other_graders(server: Server, judge: str) -> None:
    alone = grade(server, judge, {"prompt": "say 1: "}, "aeiou").reward
    multi: Any = {
        "type": "multi",
        "name": "both",
        "graders": {
            "judge": {"type": "score_model", "name": "judge", "model": judge},
            "same": {
                "type": "string_check",
                "name": "same",
                "operation": "eq",
                "input": "{{sample.output_text}}",
                "reference": "aeiou",
            },
        },
        "calculate_output": "judge + 2 * same",
    }
    graders = server.client().fine_tuning.alpha.graders
    assert graders.validate(grader=multi).grader is not None
    both = graders.run(grader=multi, model_sample="aeiou", item={"prompt": "say 1: "})
    assert both.reward == pytest.approx(alone + 2)


@pytest.mark.parametrize(
    ("item", "fields", "param"),
    [
        ({}, {}, "item"),
        ({"prompt": 3}, {}, "item"),
        ({"messages": [{"role": "user"}, 1]}, {}, "item"),
        ({"prompt": "a"}, {"range": [0.0, 1.0]}, "grader.range"),
        ({"prompt": "a"}, {"input": [{"role": "user", "content": "x"}]}, "grader.input"),
        ({"prompt": "a"}, {"sampling_params": {"seed": 1}}, "grader.sampling_params"),
    ],
)
def test_what_a_reward_model_cannot_grade(
    server: Server, judge: str, item: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        grade(server, judge, item, "sample", **fields)
    assert caught.value.param == param


# ---- the best of several ----


def completions(server: Server, **fields: Any) -> list[Any]:
    extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
    create = server.client().completions.create
    return list(create(**SAMPLED, **fields, extra_body=extra).choices)


def test_the_best_completions_win(server: Server, judge: str, score: Score) -> None:
    """Against all candidates, which the same seed gives without a choice among them."""
    prompts = ["say 1: ", "The cat"]
    every = completions(server, prompt=prompts, n=6)
    ranked = completions(server, prompt=prompts, n=3, best_of=6, extra_body={"reward_model": judge})
    assert len(ranked) == 6
    for number, prompt in enumerate(prompts):
        ids = tiny_tokenizer().encode(prompt)
        candidates = [tuple(c.token_ids) for c in every[6 * number : 6 * number + 6]]
        scores = dict(zip(candidates, score([(*ids, *c) for c in candidates]), strict=True))
        best = sorted((scores[c] for c in candidates), reverse=True)[:3]
        told = ranked[3 * number : 3 * number + 3]
        assert [choice.reward for choice in told] == pytest.approx(best, abs=1e-3)
        for choice in told:
            assert scores[tuple(choice.token_ids)] == pytest.approx(choice.reward, abs=1e-3)
    assert [choice.index for choice in ranked] == list(range(6))


def test_the_best_chat_wins(server: Server, judge: str, score: Score) -> None:
    messages: Any = [{"role": "user", "content": "say 1"}]
    create = server.client().chat.completions.create
    extra = {"return_token_ids": True}
    every = create(**SAMPLED, messages=messages, n=5, extra_body=extra).choices
    ranked = create(
        **SAMPLED, messages=messages, extra_body={**extra, "best_of": 5, "reward_model": judge}
    )
    ids = render_prompt(tiny_tokenizer(), (Message("user", "say 1"),))
    scores = score([(*ids, *choice.token_ids) for choice in every])  # type: ignore[attr-defined]
    [choice] = ranked.choices
    assert choice.reward == pytest.approx(max(scores), abs=1e-3)  # type: ignore[attr-defined]
    assert choice.message.content == every[scores.index(max(scores))].message.content
    assert ranked.usage is not None
    assert ranked.usage.completion_tokens == sum(
        len(one.token_ids)  # type: ignore[attr-defined]
        for one in every
    )


def test_best_of_in_a_chat_without_a_reward_model(server: Server) -> None:
    """As in completions: the likeliest by the mean over its tokens."""
    messages: Any = [{"role": "user", "content": "say 1"}]
    create = server.client().chat.completions.create
    options = {**SAMPLED, "messages": messages}
    extra = {"ignore_eos": True}
    every = create(**options, n=5, logprobs=True, extra_body=extra).choices
    means = [sum(entry.logprob for entry in one.logprobs.content) / 8 for one in every]
    [best] = create(**options, extra_body={**extra, "best_of": 5}).choices
    assert best.message.content == every[means.index(max(means))].message.content
    assert best.logprobs is None


def test_what_a_stop_string_cut_off_is_not_scored(server: Server, judge: str, score: Score) -> None:
    """Every candidate ends at its first `e`: the row is its text, and EOS."""
    bias = {str(tiny_tokenizer().encode("e")[0]): 4}
    options = {"max_tokens": 60, "seed": 3, "model": MODEL, "logit_bias": bias, "stop": "e"}
    create = server.client().completions.create
    choices = create(
        **options, prompt="say", n=2, best_of=3, extra_body={"reward_model": judge}
    ).choices
    stopped = [choice for choice in choices if choice.finish_reason == "stop"]
    assert stopped
    encode = tiny_tokenizer().encode
    for choice in stopped:
        row = (*encode("say"), *encode(choice.text), EOS_ID)
        assert choice.reward == pytest.approx(score([row])[0], abs=1e-3)


def test_reading_the_candidates_is_in_the_ledger(server: Server, judge: str) -> None:
    told = completions(server, prompt="say", best_of=4, extra_body={"reward_model": judge})
    assert len(told) == 1
    every = completions(server, prompt="say", n=4)
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        query = select(UsageRecord).where(UsageRecord.kind == "scoring")
        record = session.scalars(query.order_by(UsageRecord.seq.desc())).first()
        assert record is not None
        whole = select(UsageRecord).where(UsageRecord.request_id == record.request_id)
        kinds = {one.kind: one for one in session.scalars(whole)}
    expected = sum(len("say") + len(choice.token_ids) for choice in every)
    assert (record.model, record.prompt_tokens) == (judge, expected)
    assert kinds["completions"].completion_tokens == expected - 4 * len("say")


def test_scoring_is_held_to_rates(server: Server, judge: str) -> None:
    """Candidates are read by the request that was admitted; what they took, later ones wait for."""
    project, key = server.project, server.key
    runtime, base = server.runtime, server.runtime.models.base_model

    def limit(**changes: int | None) -> None:
        given = (base, runtime.settings.limits, changes)
        limits.update_rate(runtime.database, project.id, f"rl-{base}", *given)
        runtime.gate.refresh()

    limit(tokens_per_minute=60)
    create = server.client(key).completions.create
    body = {"ignore_eos": True, "reward_model": judge}
    told = create(model=MODEL, prompt="say", max_tokens=10, best_of=4, extra_body=body)
    assert told.choices[0].reward is not None
    with pytest.raises(openai.RateLimitError):
        create(model=MODEL, prompt="say", max_tokens=1)
    with pytest.raises(openai.RateLimitError):
        grade(server, judge, {"prompt": "say"}, "a")
    limit(tokens_per_minute=None)


def test_grading_is_in_the_ledger(server: Server, judge: str) -> None:
    grader: Any = {"type": "score_model", "name": "good", "model": judge}
    run = server.client().fine_tuning.alpha.graders.run
    found = run(grader=grader, model_sample="aaa", item={"prompt": "say"})
    server.runtime.meter.flush()
    with server.runtime.database.read() as session:
        query = select(UsageRecord).where(UsageRecord.kind == "scoring")
        record = session.scalars(query.order_by(UsageRecord.seq.desc())).first()
        assert record is not None
    assert (record.model, record.project_id) == (judge, server.project.id)
    assert record.prompt_tokens == found.metadata.token_usage == len("say") + len("aaa") + 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2, "reward_model": MODEL}, "reward_model"),
        ({"best_of": 2, "reward_model": "{plain}"}, "reward_model"),
        ({"reward_model": "{judge}"}, "reward_model"),
        ({"n": 2, "best_of": 2, "reward_model": "{judge}"}, "reward_model"),
        ({"best_of": 2, "reward_model": "{judge}", "stream": True}, "best_of"),
        ({"best_of": 2, "reward_model": "ft:none"}, "model"),
        ({"model": "{judge}"}, "model"),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_refused(
    server: Server,
    judge: str,
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    plain = make_model(server, tmp_path_factory)
    text = json.dumps(fields).replace("{judge}", judge).replace("{plain}", plain)
    body = {"model": MODEL, "max_tokens": 1} | json.loads(text)
    body |= {"prompt": "a"} if path == "completions" else {"messages": CHATS[0]["messages"]}
    answer = server.http().post(f"/v1/{path}", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_anothers_reward_model_is_as_absent(server: Server, judge: str) -> None:
    _, key = server.new_account("stranger")
    body = {"model": MODEL, "prompt": "a", "best_of": 2}
    tried = [
        server.http(key).post("/v1/completions", json=body | {"reward_model": name})
        for name in (judge, "ft:tiny-base:acme:judge:00000000")
    ]
    assert [answer.status_code for answer in tried] == [404, 404]
    texts = [answer.text.replace(judge, "X") for answer in tried]
    assert texts[0] == texts[1].replace("ft:tiny-base:acme:judge:00000000", "X")


@pytest.mark.parametrize(
    "given",
    [
        {"range": [0.0, 1.0]},
        {"sampling_params": {"temperature": 0.0}},
        {"input": [{"role": "user", "content": "{{ item.prompt }}"}]},
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_jobs_reward_model_takes_nothing_that_it_would_not_read(
    server: Server, judge: str, given: dict[str, Any], inside: bool
) -> None:
    """As it is refused where a grader is run; what is not given is not made up either."""
    client = server.client()
    body = b"".join(json.dumps({"prompt": f"say {n}: "}).encode() + b"\n" for n in range(12))
    prompts = client.files.create(file=("prompts.jsonl", body), purpose="fine-tune").id

    def create(part: dict[str, Any]) -> Any:
        multi = {"type": "multi", "name": "m", "graders": {"j": part}, "calculate_output": "j"}
        method = {"type": "ppo", "ppo": {"grader": multi if inside else part}}
        return client.fine_tuning.jobs.create(model=MODEL, training_file=prompts, method=method)

    plain = {"type": "score_model", "name": "judge", "model": judge}
    with pytest.raises(openai.BadRequestError, match="is a reward model, which scores") as caught:
        create(plain | given)
    assert caught.value.param == f"method.ppo.grader.{next(iter(given))}"
    grader = create(plain).method.ppo["grader"]
    assert (grader["graders"]["j"] if inside else grader) == plain


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_nothing_that_writes_starts_from_a_reward_model(
    server: Server, judge: str, method: str
) -> None:
    client = server.client()
    rows = vowel_rows(12) if method == "dpo" else [{"prompt": "a", "completion": "b"}] * 12
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = client.files.create(file=("rows.jsonl", text.encode()), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(
            model=judge, training_file=file, method={"type": method, method: {}}
        )
    assert caught.value.param == "model"
    assert "is a reward model" in caught.value.message
