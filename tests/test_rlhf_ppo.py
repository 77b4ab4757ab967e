"""`rlhf.ppo` on a tiny base: what a run does, leaves behind, survives and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_base
from train_runs import launch

from rlhf import ppo
from train.command import STOPPED
from train.run import COMPLETE, RunFolder

ROOT = Path(__file__).resolve().parent.parent
REWARDS = """
import itertools, os, time
COUNT = itertools.count()
def share(text):
    return 10 * sum(c in "aeiou" for c in text) / max(len(text), 1)
def vowels(prompts, completions, **columns):
    return [share(text) for text in completions]
def no_vowels(prompts, completions, **columns):
    return [-share(text) for text in completions]
def constant(prompts, completions, **columns):
    return [1.0] * len(completions)
def sometimes(prompts, completions, **columns):
    return [None if i % 4 == 0 else float("nan") if i % 4 == 1 else share(t)
            for i, t in enumerate(completions)]
def never(prompts, completions, **columns):
    return [None] * len(completions)
def never_of_few(prompts, completions, **columns):
    return [None if len(completions) < 16 else share(text) for text in completions]
def short(prompts, completions, **columns):
    return [1.0]
def raises(prompts, completions, **columns):
    raise RuntimeError("no luck")
def hangs(prompts, completions, **columns):
    time.sleep(60)
def moody(prompts, completions, **columns):
    if os.path.exists(os.environ["HONE_TEST_MOOD"]):
        raise RuntimeError("not today")
    if next(COUNT) == 1:
        open(os.environ["HONE_TEST_MOOD"], "w").close()
    return [share(text) for text in completions]
def letters(prompts, completions, letter, **columns):
    return [text.count(one) for text, one in zip(completions, letter)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny base, prompts and reward functions."""
    folder = tmp_path_factory.mktemp("ppo")
    save_tiny_base(folder / "tiny-base", "llama")
    rows = [{"prompt": f"say {index}: ", "letter": "a"} for index in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    return folder


def words(place: Path, out: str, **values: object) -> list[str]:
    given = {
        "base_model": place / "tiny-base",
        "models_dir": place / "models",
        "prompts_file": place / "prompts.jsonl",
        "output_dir": place / out,
        "reward.clip": "null",
        "reward.missing_eos_penalty": 0,
        "total_episodes": 64,
        "batch_size": 16,
        "max_new_tokens": 8,
        "learning_rate": 5e-3,
        "kl.coef": 0.02,
        "eval_prompts": 4,
        "eval_every": 2,
        "save_every": 2,
        "num_epochs": 2,
        "value.warmup_updates": 0,
        "value.learning_rate": 5e-3,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        **values,
    }
    return [f"{name}={value}" for name, value in given.items()]


def run(place: Path, out: str, **values: object) -> int:
    return ppo.main(words(place, out, **values))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error_of(place: Path, out: str) -> str:
    return str(json.loads((place / out / "error.json").read_text())["message"])


def test_a_rule_as_reward_rises_and_the_run_folder_tells_all(place):
    assert (
        run(
            *(place, "rises"),
            **{"reward.function": "my_rewards:vowels", "total_episodes": 960, "batch_size": 48},
        )
        == 0
    )
    folder = place / "rises"
    records = lines(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    scores = [record["objective/scores"] for record in records]
    assert sum(scores[-4:]) > sum(scores[:4]) + 0.5
    assert records[0]["objective/kl"] == 0
    assert records[0]["rollout/logprob_gap"] < 1e-4
    assert records[-1]["optimizer_steps"] == 40
    for name in ("objective/kl_k3", "val/explained_var", "grad_norm/value", "time/rollout", "lr"):
        assert name in records[-1]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "succeeded"
    assert result["comparison"]["prompts"] == 4
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "hone.json", "README.md", "loss.png")
    }
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 9
    assert "<script" not in page
    table = lines(folder / "completions.jsonl")
    assert {row["kind"] for row in table} == {"rollout", "eval", "final"}


def test_a_gold_score_is_watched_and_not_learned_from(place):
    """A run with it is the run without it, and its numbers are the function's."""
    values = {"reward.function": "my_rewards:no_vowels"}
    assert run(place, "plain", **values) == 0
    assert run(place, "gold", **values, **{"gold.function": "my_rewards:vowels"}) == 0
    adapters = [place / out / "adapter/adapter_model.safetensors" for out in ("plain", "gold")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    records = lines(place / "gold/metrics.jsonl")
    for record in records:  # the flipped score has the other sign
        scores = -record["objective/raw_scores"]
        assert record["objective/gold_score"] == pytest.approx(scores, abs=1e-5)
    judged = [record for record in records if "eval/gold" in record]
    assert [record["step"] for record in judged] == [2, 4]
    table = [row for row in lines(place / "gold/completions.jsonl") if row["kind"] == "eval"]
    for record in judged:
        texts = [row["response"] for row in table if row["step"] == record["step"]]
        shares = [10 * sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]
        assert record["eval/gold"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)


def test_a_flipped_reward_falls(place):
    values = {"total_episodes": 960, "batch_size": 48, "seed": 1}
    assert run(place, "falls", **{"reward.function": "my_rewards:no_vowels"}, **values) == 0
    scores = [r["objective/raw_scores"] for r in lines(place / "falls" / "metrics.jsonl")]
    assert -sum(scores[-4:]) <= -sum(scores[:4])  # fewer vowels than at the start


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_killed_run_goes_on_bit_for_bit(place, trunk):
    values = {
        "reward.function": "my_rewards:vowels",
        "value.trunk": trunk,
        "total_episodes": 96,
        "kl.target": 1.0,
        "kl.budget": 50.0,
    }
    whole, cut = f"whole-{trunk}", f"cut-{trunk}"
    assert run(place, whole, **values) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.ppo", *words(place, cut, **values)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{place}", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((place / cut / "checkpoints").glob("checkpoint-*/complete")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / cut / "result.json").exists()
    newest = RunFolder(place / cut).newest_checkpoint()
    assert newest is not None
    (newest / COMPLETE).write_text('{"seconds": 1000.0}')
    assert run(place, cut, **values) == 0
    result = json.loads((place / cut / "result.json").read_text())
    assert 1000 <= result["seconds"] < 1600  # those of both attempts
    one, other = (
        load_file(place / out / "adapter/adapter_model.safetensors") for out in (whole, cut)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    last = [max((place / out / "checkpoints").glob("checkpoint-6")) for out in (whole, cut)]
    for name in ("heads.safetensors", "adapter_model.safetensors"):
        states = [load_file(folder / name) for folder in last]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    kept = [
        [(r["step"], r["objective/scores"], r["objective/kl_coef"]) for r in lines(path)]
        for path in (place / whole / "metrics.jsonl", place / cut / "metrics.jsonl")
    ]
    assert kept[0] == kept[1]


def test_a_signal_ends_the_run_in_order_and_it_goes_on(place):
    values = {"reward.function": "my_rewards:vowels", "total_episodes": 1600}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.ppo", *words(place, "signal", **values)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{place}", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (place / "signal" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == STOPPED
    assert list((place / "signal" / "checkpoints").glob("checkpoint-*/complete"))
    refused = run(place, "signal", **values | {"learning_rate": 1e-6})
    assert refused == 2
    assert "learning_rate" in error_of(place, "signal")


def test_columns_of_the_prompts_reach_the_function(place):
    assert run(place, "columns", **{"reward.function": "my_rewards:letters"}) == 0


def test_rewards_that_are_no_numbers_are_skipped_and_counted(place):
    assert run(place, "some", **{"reward.function": "my_rewards:sometimes"}) == 0
    assert json.loads((place / "some" / "result.json").read_text())["skipped"] == 32


def test_files_of_a_run_are_json_whatever_the_rewards(place):
    """Evaluations without a number, and none at all: no file says NaN, and the run goes on."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values = {"reward.function": "my_rewards:never_of_few", "total_episodes": 32, "save_every": 1}
    assert run(place, "numberless", **values) == 0
    assert run(place, "unevaluated", **values, eval_prompts=0) == 0
    for folder in (place / "numberless", place / "unevaluated"):
        for path in (folder / "metrics.jsonl", folder / "completions.jsonl"):
            records = [
                json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
            ]
            assert all("eval/reward" not in record for record in records)
        states = list(folder.glob("checkpoints/checkpoint-*/*.json"))
        assert states
        for path in states:
            json.loads(path.read_text(), parse_constant=refuse)
    page = (place / "numberless" / "report.html").read_text()
    assert "<td>none</td>" in page
    assert any("eval/length_mean" in r for r in lines(place / "numberless" / "metrics.jsonl"))


def test_a_constant_reward_is_told(place):
    assert run(place, "constant", **{"reward.function": "my_rewards:constant"}) == 0
    events = [event["message"] for event in lines(place / "constant" / "events.jsonl")]
    assert any("every response got the same score" in message for message in events)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("never", "the function my_rewards:never gave no finite number for any of 16 responses"),
        ("short", "1 values for 16 completions"),
        ("raises", "RuntimeError: no luck"),
        ("hangs", "did not answer within timeout_s"),
    ],
)
def test_a_function_that_fails_ends_the_run_and_names_the_prompts(place, function, told):
    values = {"reward.function": f"my_rewards:{function}", "reward.timeout_s": 3, "eval_prompts": 0}
    assert run(place, f"fails-{function}", **values) == 1
    message = error_of(place, f"fails-{function}")
    assert told in message
    assert "lines" in message
    assert "say" in message


def test_a_kl_that_explodes_ends_the_run_with_the_best_policy(place):
    values = {"learning_rate": 0.5, "kl.stop": 3.0, "kl.coef": 0.0, "total_episodes": 640}
    assert run(place, "explodes", **{"reward.function": "my_rewards:vowels"}, **values) == 0
    result = json.loads((place / "explodes" / "result.json").read_text())
    assert result["updates"] < 40
    assert result["kl"] <= 3.0
    assert (place / "explodes" / "adapter" / "adapter_model.safetensors").is_file()
    events = [event["message"] for event in lines(place / "explodes" / "events.jsonl")]
    assert any("beyond kl.stop" in message for message in events)
    assert any("The adapter is the policy of update" in message for message in events)
    (place / "explodes" / "result.json").unlink()  # as though it had been killed just before
    assert run(place, "explodes", **{"reward.function": "my_rewards:vowels"}, **values) == 0
    again = json.loads((place / "explodes" / "result.json").read_text())
    assert [again[name] for name in ("updates", "kl")] == [
        result[name] for name in ("updates", "kl")
    ]


def test_the_answers_of_the_end_are_told_once(place):
    values = {"reward.function": "my_rewards:vowels", "total_episodes": 32}
    assert run(place, "once", **values) == 0
    (place / "once" / "result.json").unlink()
    assert run(place, "once", **values) == 0
    kinds = Counter(row["kind"] for row in lines(place / "once" / "completions.jsonl"))
    assert kinds["final"] == 4


def test_layers_by_name_are_those_of_policy_and_value(place):
    values = {"reward.function": "my_rewards:vowels", "total_episodes": 32, "eval_prompts": 0}
    assert run(place, "named", **values, **{"lora.target_modules": "[q_proj,v_proj]"}) == 0
    names = load_file(place / "named/adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_an_unfinished_run_is_not_resumed_from_another_adapter(place, monkeypatch):
    assert run(place, "start", **{"reward.function": "my_rewards:vowels"}) == 0
    start = place / "start-of-changed"
    shutil.copytree(place / "start/adapter", start)
    mood = place / "mood-of-adapter"
    monkeypatch.setenv("HONE_TEST_MOOD", str(mood))
    values = {"reward.function": "my_rewards:moody", "eval_prompts": 0, "start_adapter": start}
    assert run(place, "other-start", **values, save_every=1) == 1
    weights = load_file(start / "adapter_model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in weights.items()}, start / "adapter_model.safetensors"
    )
    assert run(place, "other-start", **values, save_every=1) == 2
    assert "start_adapter" in error_of(place, "other-start")
    assert "has changed since the unfinished run" in error_of(place, "other-start")


def test_after_a_failing_function_the_run_goes_on_where_it_was(place, monkeypatch):
    mood = place / "mood"
    monkeypatch.setenv("HONE_TEST_MOOD", str(mood))
    values = {"reward.function": "my_rewards:moody", "eval_prompts": 0}
    assert run(place, "moody", **values) == 1
    assert "RuntimeError: not today" in error_of(place, "moody")
    done = len(lines(place / "moody" / "metrics.jsonl"))
    assert done == 2
    mood.unlink()
    assert run(place, "moody", **values) == 0
    assert len(lines(place / "moody" / "metrics.jsonl")) == 4


def test_an_unfinished_run_is_not_resumed_on_other_prompts(place, monkeypatch):
    monkeypatch.setenv("HONE_TEST_MOOD", str(place / "changing"))
    prompts = place / "changing.jsonl"
    prompts.write_bytes((place / "prompts.jsonl").read_bytes())
    values = {"reward.function": "my_rewards:moody", "eval_prompts": 0, "prompts_file": prompts}
    assert run(place, "changed", **values, save_every=1) == 1
    prompts.write_text(prompts.read_text() + json.dumps({"prompt": "more", "letter": "a"}) + "\n")
    assert run(place, "changed", **values, save_every=1) == 2
    assert "changing.jsonl has changed since the unfinished run" in error_of(place, "changed")


def test_some_prompts_over_the_context_are_dropped_and_counted(place):
    rows = [{"prompt": "x" * (4000 if i < 3 else 5 + i)} for i in range(12)]
    path = place / "some-long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"reward.function": "my_rewards:vowels", "prompts_file": path, "total_episodes": 16}
    assert run(place, "some-long", **values) == 0
    events = [event["message"] for event in lines(place / "some-long" / "events.jsonl")]
    assert any("3 prompts dropped" in m and "lines 1, 2, 3" in m for m in events)


def test_prompts_of_wrong_roles_are_refused(place, capsys):
    path = place / "roles.jsonl"
    row = {"messages": [{"role": "bot", "content": "hello"}]}
    path.write_text(12 * (json.dumps(row) + "\n"))
    values = {"reward.function": "my_rewards:vowels", "prompts_file": path}
    assert run(place, "roles", **values) == 2
    assert "expected system, developer, user, assistant or tool" in capsys.readouterr().err


@pytest.fixture
def reward_server():
    """A real HTTP server that scores by length, and fails the first time."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append(body)
            if len(calls) == 1:
                self.send_response(500)
                self.end_headers()
                return
            found = json.dumps({"rewards": [len(text) / 4 for text in body["completions"]]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(found.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", calls
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_as_reward_is_asked_again_when_it_fails(place, reward_server):
    url, calls = reward_server
    assert run(place, "url", **{"reward.url": url, "total_episodes": 32}) == 0
    assert len(calls) >= 4
    assert set(calls[1]) >= {"prompts", "completions", "letter"}


def test_a_url_that_stays_away_ends_the_run_and_names_the_prompts(place):
    values = {"reward.url": "http://127.0.0.1:9", "reward.retries": 1, "eval_prompts": 0}
    assert run(place, "away", **values) == 1
    message = error_of(place, "away")
    assert "failed 2 times" in message
    assert "lines" in message
    assert "say" in message


def test_a_grader_of_the_api_as_reward(place):
    grader = {
        "type": "multi",
        "graders": {
            "a": {
                "type": "string_check",
                "name": "a",
                "input": "{{ sample.output_text }}",
                "reference": "{{ item.letter }}",
                "operation": "like",
            }
        },
        "calculate_output": "2 * a",
    }
    settings = place / "grader.yaml"
    settings.write_text(json.dumps({"reward": {"grader": grader}}))
    given = words(place, "grader", total_episodes=32)
    assert ppo.main(["--config", str(settings), *given]) == 0
    scores = {row["score"] for row in lines(place / "grader" / "completions.jsonl")}
    assert scores <= {0.0, 2.0}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "exactly one of model, function, url and grader"),
        ({"reward.function": "my_rewards:vowels", "max_new_tokens": 4000}, "prompt included"),
        ({"reward.function": "my_rewards"}, "write it as module:function"),
        ({"reward.function": "nowhere:f"}, "cannot be imported"),
        ({"reward.function": "my_rewards:vowels", "prompts_file": "none.jsonl"}, "is not a file"),
        ({"reward.function": "my_rewards:vowels", "num_minibatches": 3}, "does not divide"),
        ({"reward.function": "my_rewards:vowels", "total_episodes": 8}, "is less than batch_size"),
        ({"reward.function": "my_rewards:vowels", "max_prompt_length": 2}, "more than 2 tokens"),
        ({"reward.function": "my_rewards:vowels", "lora.dropout": 0.1}, "must be 0"),
        ({"reward.function": "my_rewards:vowels", "value.start": "reward"}, "names no reward"),
        ({"reward.model": "tests"}, "is no reward model"),
        ({"reward.function": "my_rewards:vowels", "gold.model": "runs/reward"}, "gold takes"),
        ({"reward.function": "my_rewards:vowels", "kl.targget": 5}, "target"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(place, capsys, values, told):
    assert run(place, "refused", **values) == 2
    assert told in capsys.readouterr().err


def test_two_processes_take_the_same_steps_as_one(place):
    values = {
        "reward.function": "my_rewards:vowels",
        "total_episodes": 32,
        "eval_prompts": 0,
        "learning_rate": 1e-3,
    }
    for out, count in (("one-process", 1), ("two-processes", 2)):
        assert launch("rlhf.ppo", words(place, out, **values), count, [place]) == 0
    one, two = (
        load_file(place / out / "adapter/adapter_model.safetensors")
        for out in ("one-process", "two-processes")
    )
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    numbers = [lines(place / out / "metrics.jsonl")[-1] for out in ("one-process", "two-processes")]
    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "val/explained_var"):
        assert numbers[0][name] == pytest.approx(numbers[1][name], abs=1e-5)
