"""Learning from judgements through the API, everything real, on a tiny base. Slow: two minutes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server
from test_job_whole import ended, wait_for
from test_job_whole import server as server  # a fixture
from test_rlhf_reward import vowel_rows

pytestmark = pytest.mark.slow

LORA = {"lora": {"r": 4}}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    return server.client()


def upload(client: openai.OpenAI, rows: list[dict[str, Any]]) -> str:
    body = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return client.files.create(file=("rows.jsonl", body), purpose="fine-tune").id


def run(client: openai.OpenAI, **fields: Any) -> Any:
    job = client.fine_tuning.jobs.create(model=fields.pop("model", MODEL), **fields)
    return wait_for(lambda: ended(client, job.id), timeout_s=240)


def told(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]


def test_from_comparisons_to_a_policy(client: openai.OpenAI, tmp_path: Path) -> None:
    pairs = upload(client, vowel_rows(60))
    hyper = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 20}

    reward = run(
        client,
        training_file=pairs,
        method={"type": "reward_model", "reward_model": {"hyperparameters": hyper}},
        suffix="judge",
        extra_body=LORA,
    )
    assert reward.status == "succeeded", reward.error
    names = {client.files.retrieve(file_id).filename for file_id in reward.result_files}
    assert {"step_metrics.csv", "report_card.json", "report.html"} <= names
    with pytest.raises(openai.BadRequestError, match="is a reward model"):
        client.completions.create(model=reward.fine_tuned_model, prompt="a", max_tokens=1)

    dpo = run(
        client,
        training_file=pairs,
        method={"type": "dpo", "dpo": {"hyperparameters": hyper | {"beta": 0.2}}},
        extra_body=LORA | {"reward_model": reward.fine_tuned_model, "max_completion_tokens": 6},
    )
    assert dpo.status == "succeeded", dpo.error
    assert dpo.method.dpo.hyperparameters.beta == 0.2
    assert dpo.trained_tokens > 0
    metrics = [
        event.data
        for event in client.fine_tuning.jobs.list_events(dpo.id, limit=100)
        if event.type == "metrics"
    ]
    assert any("rewards/margins" in data for data in metrics)
    [verdict] = [m for m in told(client, dpo.id) if m.startswith(("Promoted: ", "Not promoted: "))]
    assert any(word in verdict for word in ("held-out", "reward", "wins", "length", "end", "KL"))
    files = {client.files.retrieve(i).filename: i for i in dpo.result_files}
    assert {"report.html", "completions.jsonl"} <= files.keys()
    rows = [
        json.loads(line)
        for line in client.files.content(files["completions.jsonl"]).text.splitlines()
    ]
    assert {row["kind"] for row in rows} == {"start", "final"}
    assert all(isinstance(row["score"], float) for row in rows)  # of the reward model
    answer = client.completions.create(model=dpo.fine_tuned_model, prompt="say: ", max_tokens=4)
    assert answer.choices[0].text is not None

    kto = run(
        client,
        model=dpo.fine_tuned_model,
        training_file=upload(
            client,
            [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in vowel_rows(30)
                for side in ("chosen", "rejected")
            ],
        ),
        method={"type": "kto", "kto": {"hyperparameters": hyper}},
    )
    assert kto.status == "succeeded", kto.error

    prompts = upload(client, [{"prompt": f"say {i}: "} for i in range(64)])
    grader = {"type": "score_model", "name": "judge", "model": reward.fine_tuned_model}
    ppo = run(
        client,
        training_file=prompts,
        method={
            "type": "ppo",
            "ppo": {
                "grader": grader,
                "hyperparameters": {
                    "batch_size": 16,
                    "n_epochs": 4,
                    "learning_rate_multiplier": 50,
                    "eval_samples": 8,
                    "eval_interval": 4,
                },
            },
        },
        extra_body=LORA | {"max_completion_tokens": 8},
    )
    assert ppo.status == "succeeded", ppo.error
    assert ppo.method.ppo["grader"]["model"] == reward.fine_tuned_model
    messages = told(client, ppo.id)
    assert any(message.startswith(("Promoted: ", "Not promoted: ")) for message in messages)
    assert any("score=" in message and "KL=" in message for message in messages)
    names = {client.files.retrieve(file_id).filename for file_id in ppo.result_files}
    assert {"completions.jsonl", "report.html"} <= names
    answer = client.completions.create(model=ppo.fine_tuned_model, prompt="say: ", max_tokens=4)
    assert answer.model == ppo.fine_tuned_model


def test_reinforcement_by_a_string_check(client: openai.OpenAI) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "letter": "a"} for i in range(32)]
    grader = {
        "type": "string_check",
        "name": "has-a",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.letter }}",
        "operation": "like",
    }
    done = run(
        client,
        training_file=upload(client, rows),
        validation_file=upload(client, [row | {"letter": "e"} for row in rows[:5]]),
        method={
            "type": "reinforcement",
            "reinforcement": {
                "grader": grader,
                "hyperparameters": {"batch_size": 16, "eval_samples": 4, "eval_interval": 3},
            },
        },
        extra_body=LORA | {"max_completion_tokens": 6},
    )
    assert done.status == "succeeded", done.error
    assert done.hyperparameters.n_epochs == 1
    assert done.method.reinforcement.hyperparameters.eval_interval == 3
    assert any("reward=" in message for message in told(client, done.id))

    files = {client.files.retrieve(i).filename: i for i in done.result_files}
    lines = client.files.content(files["completions.jsonl"]).text.splitlines()
    answers = [row for row in map(json.loads, lines) if row["kind"] in ("eval", "final")]
    shares: dict[int, float] = {}  # of the answers that hold the letter of the validation file
    for step in {row["step"] for row in answers}:
        texts = [row["response"] for row in answers if row["step"] == step]
        assert len(texts) == 4
        shares[step] = sum("e" in text for text in texts) / 4
    assert sorted(shares) == [3, 6, 8]
    events = client.fine_tuning.jobs.list_events(done.id, limit=100)
    seen = {
        e.data["step"]: e.data["eval/reward"] for e in events if "eval/reward" in (e.data or {})
    }
    assert seen == pytest.approx(shares)
    table = list(csv.DictReader(client.files.content(files["step_metrics.csv"]).text.splitlines()))
    column = {int(row["step"]): row["eval/reward"] for row in table if row["eval/reward"]}
    assert {step: float(value) for step, value in column.items()} == pytest.approx(shares)
    assert all(row["reward"] or row["eval/reward"] for row in table)


def test_what_a_method_cannot_use_is_refused(client: openai.OpenAI) -> None:
    pairs = upload(client, vowel_rows(12))
    grader = {"type": "score_model", "name": "judge", "model": MODEL}
    with pytest.raises(openai.BadRequestError, match="is no reward model of yours"):
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=pairs, method={"type": "ppo", "ppo": {"grader": grader}}
        )
    for extra in ({"dry_run": True}, {}):
        with pytest.raises(openai.BadRequestError, match="is no reward model of yours") as caught:
            client.fine_tuning.jobs.create(
                model=MODEL,
                training_file=pairs,
                method={"type": "dpo"},
                extra_body={"reward_model": MODEL} | extra,
            )
        assert caught.value.param == "reward_model"
    with pytest.raises(openai.BadRequestError, match="is not used by the method 'supervised'"):
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=pairs, extra_body={"reward_model": MODEL}
        )
    texts = upload(client, [{"text": f"row {i}"} for i in range(12)])
    with pytest.raises(openai.BadRequestError, match="the method dpo takes pref") as caught:
        client.fine_tuning.jobs.create(model=MODEL, training_file=texts, method={"type": "dpo"})
    assert caught.value.param == "training_file"
    with pytest.raises(openai.BadRequestError, match="supervised fine-tuning takes") as caught:
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=upload(client, [{"text": "a"}] * 12), validation_file=pairs
        )
    assert caught.value.param == "validation_file"
