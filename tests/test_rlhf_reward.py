"""`rlhf.reward` and its parts: comparisons, loss, report card, and what is saved."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import save_tiny_base
from train_runs import launch

from rlhf import ppo, report_card, reward
from rlhf.comparisons import load_comparisons, split_prompts
from rlhf.reward_run import groups_a_step
from rlhf.reward_trainer import pair_loss
from rlhf.rewards import by_length
from serve.engine import base_model

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vowel_rows(count: int = 90) -> list[dict]:
    """Pairs of which the answer with more vowels is chosen."""
    draw = np.random.default_rng(0)
    rows = []
    while len(rows) < count:
        one, other = ("".join(draw.choice(list("aeioubcdfg "), 10)) for _ in range(2))
        scores = [sum(c in "aeiou" for c in text) for text in (one, other)]
        if scores[0] != scores[1] and one.strip() and other.strip():
            chosen, rejected = (one, other) if scores[0] > scores[1] else (other, one)
            rows.append(
                {"prompt": f"say {len(rows) % 30}: ", "chosen": chosen, "rejected": rejected}
            )
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    save_tiny_base(folder / "tiny-base", "llama")
    write(folder / "pairs.jsonl", vowel_rows())
    return folder


def words(place: Path, out: str, **values: object) -> list[str]:
    given = {
        "base_model": place / "tiny-base",
        "models_dir": place / "models",
        "train_file": place / "pairs.jsonl",
        "output_dir": place / out,
        "learning_rate": 5e-3,
        "batch_size": 8,
        "num_epochs": 3,
        "max_length": 128,
        "max_new_tokens": 8,
        "normalize_samples": 64,
        "validation_fraction": 0.25,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        **values,
    }
    return [f"{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def trained(place) -> Path:
    assert reward.main(words(place, "trained")) == 0
    return place / "trained"


def error_of(place: Path, out: str) -> str:
    return str(json.loads((place / out / "error.json").read_text())["message"])


# ---- the run ----


def test_a_reward_model_learns_what_was_preferred(trained):
    card = json.loads((trained / "report_card.json").read_text())
    assert card["accuracy"] > 0.8
    low, high = card["accuracy_interval"]
    assert low <= card["accuracy"] <= high
    assert card["noise_ceiling"] is None
    assert "judged once" in card["noise_ceiling_reason"]
    page = (trained / "report.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"accuracy", "margin", "mean_reward"} <= set(records[0])
    assert any("eval_accuracy" in record for record in records)


def test_a_saved_reward_model_scores_the_same_with_plain_peft(trained, place):
    adapter = trained / "adapter"
    head = load_file(adapter / "head.safetensors")["score.weight"]
    scale = json.loads((adapter / "reward.json").read_text())
    model, tokenizer = base_model.load(place / "tiny-base", "float32", "cpu")
    model = PeftModel.from_pretrained(model, str(adapter))
    groups = load_comparisons(place / "pairs.jsonl", tokenizer, 1).groups
    rows = [ids for group in groups for ids in group.answers]
    right, total = 0, 0
    scores = {}
    with torch.no_grad():
        for ids in rows:
            assert ids[-1] == tokenizer.eos_token_id
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            raw = float(head[0] @ output.hidden_states[-1][0, -1])
            scores[ids] = (raw - scale["mean"]) / scale["std"]
    for group in groups:
        for pair in group.pairs:
            right += scores[group.answers[pair.better]] > scores[group.answers[pair.worse]]
            total += 1
    assert right / total > 0.8
    card = json.loads((trained / "report_card.json").read_text())
    _, held = split_prompts(load_comparisons(place / "pairs.jsonl", tokenizer, 1), 0.25, 0)
    wins = [
        scores[g.answers[p.better]] > scores[g.answers[p.worse]]
        for g in held.groups
        for p in g.pairs
    ]
    assert card["accuracy"] == pytest.approx(sum(wins) / len(wins))


def test_scores_of_reference_answers_have_mean_0_and_std_1(trained, place):
    """Fresh samples of the base, which the run has not seen, within their standard error."""
    from rlhf.prompts import Prompt
    from rlhf.rollout import Sampler, seed_of
    from train.base_model import load_base
    from train.config import RunConfig

    config = RunConfig(
        base_model=str(place / "tiny-base"),
        models_dir=place / "models",
        output_dir=place / "x",
        dtype="float32",
        device="cpu",
        threads=1,
    )
    base = load_base(config)
    groups = load_comparisons(place / "pairs.jsonl", base.tokenizer, 1).groups
    prompts = [Prompt(1, groups[i % len(groups)].prompt, "") for i in range(256)]
    sampler = Sampler(base, "cpu", 40, 256, stop_at_eos=True)
    samples = sampler.sample(None, prompts, [seed_of(99, 1, i) for i in range(256)], 8, 1.0)
    sampler.close()
    model = PeftModel.from_pretrained(base.model, str(trained / "adapter"))
    head = load_file(trained / "adapter" / "head.safetensors")["score.weight"][0]
    scale = json.loads((trained / "adapter" / "reward.json").read_text())
    found = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor([[*sample.prompt.ids, *sample.response]])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            found.append((float(head @ hidden) - scale["mean"]) / scale["std"])
    scores = torch.tensor(found)
    error = math.hypot(1 / math.sqrt(64), 1 / math.sqrt(256))  # of both samples' means
    assert abs(float(scores.mean())) < 3.5 * error
    assert float(scores.std()) == pytest.approx(1, abs=0.35)


def test_ppo_takes_the_reward_model_and_its_value_starts_as_it(trained, place):
    prompts = write(place / "prompts.jsonl", [{"prompt": f"say {i}: "} for i in range(20)])
    given = {
        "base_model": place / "tiny-base",
        "models_dir": place / "models",
        "prompts_file": prompts,
        "output_dir": place / "ppo",
        "reward.model": trained / "adapter",
        "total_episodes": 480,
        "batch_size": 48,
        "max_new_tokens": 10,
        "learning_rate": 5e-3,
        "value.learning_rate": 1e-3,
        "eval_prompts": 4,
        "device": "cpu",
        "threads": 1,
        "kl.coef": 0.01,
    }
    assert ppo.main([f"{name}={value}" for name, value in given.items()]) == 0
    lines = (place / "ppo" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line)["objective/raw_scores"] for line in lines]
    assert sum(scores[-3:]) > sum(scores[:3])
    assert json.loads(lines[0])["grad_norm/policy"] > 0  # no warm-up: the value knows already


def test_a_reward_model_and_ppo_in_bfloat16_pass_their_own_trials(place):
    assert reward.main(words(place, "half", dtype="bfloat16", num_epochs=1)) == 0
    prompts = write(place / "prompts.jsonl", [{"prompt": f"say {i}: "} for i in range(20)])
    given = {
        "base_model": place / "tiny-base",
        "models_dir": place / "models",
        "prompts_file": prompts,
        "output_dir": place / "ppo-half",
        "reward.model": place / "half" / "adapter",
        "total_episodes": 32,
        "batch_size": 16,
        "max_new_tokens": 10,
        "eval_prompts": 4,
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 1,
    }
    assert ppo.main([f"{name}={value}" for name, value in given.items()]) == 0
    assert json.loads((place / "ppo-half" / "result.json").read_text())["updates"] == 2


def test_a_reward_model_of_another_base_is_refused(trained, place, capsys):
    save_tiny_base(place / "other-base", "llama", seed=7)
    prompts = write(place / "prompts.jsonl", [{"prompt": f"say {i}: "} for i in range(20)])
    given = [
        f"base_model={place / 'other-base'}",
        f"models_dir={place / 'models'}",
        f"prompts_file={prompts}",
        f"output_dir={place / 'refused'}",
        f"reward.model={trained / 'adapter'}",
        "device=cpu",
    ]
    assert ppo.main(given) == 1
    assert "train both on one base" in capsys.readouterr().err
    headless = place / "headless"
    headless.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "reward.json"):
        (headless / name).write_bytes((trained / "adapter" / name).read_bytes())
    given[4] = f"reward.model={headless}"
    given[0] = f"base_model={place / 'tiny-base'}"
    assert ppo.main(given) == 2
    assert "it has no head.safetensors" in capsys.readouterr().err


def test_a_killed_run_goes_on_bit_for_bit(trained, place):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.reward", *words(place, "cut")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((place / "cut" / "checkpoints").glob("checkpoint-*/complete")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert reward.main(words(place, "cut")) == 0
    for name in ("adapter_model.safetensors", "head.safetensors"):
        one, other = (load_file(folder / "adapter" / name) for folder in (trained, place / "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_take_the_same_steps_as_one(place):
    values = {"num_epochs": 1, "learning_rate": 1e-3, "normalize_on": "validation"}
    for out, count in (("one-process", 1), ("two-processes", 2)):
        assert launch("rlhf.reward", words(place, out, **values), count) == 0
    for name in ("adapter_model.safetensors", "head.safetensors"):
        one, two = (
            load_file(place / out / "adapter" / name) for out in ("one-process", "two-processes")
        )
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


def test_a_step_is_the_same_prompts_for_one_two_four_or_eight_processes():
    for batch_size, pairs, wanted in ((32, 1.0, 32), (32, 3.0, 8), (32, 1.2, 24)):
        assert {groups_a_step(batch_size, pairs, size) for size in (1, 2, 4, 8)} == {wanted}
    assert [groups_a_step(8, 2.7, size) for size in (1, 2, 3)] == [4, 4, 6]
    assert groups_a_step(1, 5.0, 1) == 1


@pytest.mark.parametrize(
    ("rows", "values", "told"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 12, {}, "are the same"),
        (vowel_rows(1), {}, "at least 10"),
        ([row | {"label_prob": 0.5} for row in vowel_rows(12)], {}, "every comparison is a tie"),
        (vowel_rows(12), {"max_length": 8, "on_long": "error"}, "more than max_length 8"),
        (vowel_rows(12), {"max_length": 8, "on_long": "drop"}, "every comparison has more"),
        (
            [
                {"prompt": [{"role": "bot", "content": "a"}], "chosen": [], "rejected": []}
                for _ in range(12)
            ],
            {},
            "expected system, developer, user, assistant or tool",
        ),
        (
            [row | {"prompt": "one"} for row in vowel_rows(12)],
            {},
            "compares answers to a single prompt",
        ),
        ([{"text": f"a {i}"} for i in range(12)], {}, "comparisons are preference rows"),
    ],
)
def test_files_that_cannot_be_learned_from_are_refused(place, rows, values, told, capsys):
    path = write(place / "bad.jsonl", rows)
    assert reward.main(words(place, "bad", train_file=path, **values)) == 2
    assert told in capsys.readouterr().err


def test_long_prompts_lose_their_start_and_answers_stay_whole(place):
    rows = [row | {"prompt": "x" * 100 + row["prompt"]} for row in vowel_rows(30)]
    path = write(place / "long.jsonl", rows)
    assert reward.main(words(place, "long", train_file=path, max_length=64, num_epochs=1)) == 0
    events = (place / "long" / "events.jsonl").read_text()
    assert "comparisons of more than 64 tokens cut" in events


# ---- its parts ----


@pytest.mark.parametrize(("prob", "smoothing"), [(0.5, 0.0), (1.0, 0.1), (0.8, 0.0), (0.9, 0.05)])
def test_the_loss_is_least_at_the_logit_of_the_probability(prob, smoothing):
    difference = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([difference], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = pair_loss(
            difference, torch.zeros(1), torch.tensor([prob]), torch.zeros(1), smoothing
        ).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    share = prob * (1 - smoothing) + (1 - prob) * smoothing
    assert float(difference.detach()) == pytest.approx(math.log(share / (1 - share)), abs=1e-3)


def test_the_loss_with_a_margin_is_trls():
    better, worse, margin = torch.tensor([1.0]), torch.tensor([0.25]), torch.tensor([0.5])
    found = pair_loss(better, worse, torch.ones(1), margin)
    assert float(found) == pytest.approx(-math.log(1 / (1 + math.exp(-(0.75 - 0.5)))), abs=1e-6)


def pairs_of(differences, probs=None, lengths=None):
    probs = probs or [1.0] * len(differences)
    lengths = lengths or [(5, 5)] * len(differences)
    return [
        report_card.Judged(i, i, d, 0.0, *length, p)
        for i, (d, p, length) in enumerate(zip(differences, probs, lengths, strict=True))
    ]


def test_accuracy_counts_equal_scores_half():
    assert report_card.accuracy(pairs_of([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)
    assert report_card.accuracy([]) is None


def test_the_bootstrap_interval_covers_the_true_rate_about_as_often_as_it_says():
    draw = np.random.default_rng(3)
    covered = 0
    for trial in range(60):
        differences = np.where(draw.random(150) < 0.7, 1.0, -1.0).tolist()
        interval = report_card.bootstrap(pairs_of(differences), seed=trial)
        assert interval is not None
        covered += interval[0] <= 0.7 <= interval[1]
    assert covered >= 50


def test_calibration_of_scores_that_are_log_odds():
    """Labels drawn from sigmoid(d): calibrated, temperature 1; twice as sure: temperature 2."""
    draw = np.random.default_rng(0)
    true = draw.normal(0, 1.5, 20_000)
    wins = draw.random(20_000) < 1 / (1 + np.exp(-true))
    differences = np.where(wins, true, -true)  # of the winner over the loser
    bins = report_card.reliability(pairs_of(differences.tolist()))
    assert report_card.expected_calibration_error(bins, 20_000) < 0.02
    ones = [1.0] * 20_000
    assert report_card.fit_temperature(differences.tolist(), ones) == pytest.approx(1, abs=0.1)
    twice = (2 * differences).tolist()
    assert report_card.fit_temperature(twice, ones) == pytest.approx(2, abs=0.2)


def test_rows_of_similar_length_go_together():
    parts = by_length([5, 1, 9, 2, 5], 10)
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3, 4]
    assert all(
        len(part) == 1 or len(part) * max([5, 1, 9, 2, 5][i] for i in part) <= 10 for part in parts
    )
