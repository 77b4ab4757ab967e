"""What decides whether a policy of DPO or KTO is promoted: held-out answers, and its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_rlhf_reward import vowel_rows, write
from test_rlhf_reward import words as reward_words
from test_rlhf_trl import margins, records, words
from tiny_models import save_tiny_base

from data.render import render_answer
from rlhf import dpo, kto, reward
from rlhf.evaluate import gate
from serve.engine import base_model

OF_DPO = {"num_epochs": 2, "eval_prompts": 5, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    save_tiny_base(folder / "tiny-base", "llama")
    save_tiny_base(folder / "other-base", "llama", seed=7)
    rows = vowel_rows(80)
    write(folder / "train.jsonl", rows[:60])
    write(folder / "pairs.jsonl", rows[60:])  # held out
    return folder


def files(place: Path) -> dict[str, Path]:
    return {"train_file": place / "train.jsonl", "validation_file": place / "pairs.jsonl"}


def outcome(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(place) -> Path:
    assert dpo.main(words(place, "tuned", **files(place), **OF_DPO)) == 0
    return place / "tuned"


def test_held_out_pairs_are_ordered_by_the_policys_own_reward(place, tuned):
    found, wanted = outcome(tuned), margins(place, tuned / "adapter")
    assert found["held_out"]["pairs"] == len(wanted) == 20
    assert found["held_out"]["accuracy"] == sum(margin > 0 for margin in wanted) / 20
    low, high = found["held_out"]["accuracy_interval"]
    assert low <= found["held_out"]["accuracy"] <= high
    assert found["kl"] > 0.001
    share = f"orders {found['held_out']['accuracy']:.1%} of 20 held-out pairs as people did"
    assert share in found["gate"]["reasons"]
    assert "win_rate" not in found["comparison"]  # nothing scores answers


def test_start_and_end_answer_the_same_held_out_prompts(place, tuned):
    rows = answers(tuned)
    lines = (place / "pairs.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in lines]
    for kind in ("start", "final"):
        shown = [row for row in rows if row["kind"] == kind]
        assert [row["line"] for row in shown] == [1, 2, 3, 4, 5]
        for row in shown:
            assert asked[row["line"] - 1] in row["prompt"]
    page = (tuned / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "<h1>DPO run</h1>" in page
    assert "orders" in page
    assert "<td>final</td>" in page


def test_the_same_command_on_a_run_that_was_killed_at_its_end_judges_alike(place, tuned):
    before, rows = outcome(tuned), answers(tuned)
    (tuned / "result.json").unlink()
    assert dpo.main(words(place, "tuned", **files(place), **OF_DPO)) == 0
    after = outcome(tuned)
    assert {name: after[name] for name in ("gate", "kl", "held_out", "comparison")} == {
        name: before[name] for name in ("gate", "kl", "held_out", "comparison")
    }
    assert answers(tuned) == rows


@pytest.mark.parametrize("start", [False, True])
def test_a_policy_that_learned_nothing_is_not_promoted(place, tuned, start):
    """Its reference is where it started, an adapter or the base, so all its rewards are 0."""
    given = OF_DPO | {"num_epochs": 1, "learning_rate": 1e-30, "weight_decay": 0}
    if start:
        given["start_adapter"] = tuned / "adapter"
    out = f"idle-{start}"
    assert dpo.main(words(place, out, **files(place), **given)) == 0
    found = outcome(place / out)
    assert found["held_out"]["accuracy"] == 0.5
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["gate"] == {
        "promote": False,
        "reasons": ["orders 50.0% of 20 held-out pairs as people did"],
    }
    texts = {kind: [] for kind in ("start", "final")}
    for row in answers(place / out):
        texts[row["kind"]].append(row["response"])
    assert texts["start"] == texts["final"]


@pytest.mark.parametrize("across", [False, True])
def test_judged_answers_are_ordered_by_prompt_or_where_no_prompt_has_both_over_all(place, across):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in vowel_rows(40)
        for side in ("chosen", "rejected")
    ]
    write(place / "judged.jsonl", rows[:60])
    held = rows[60:77]
    if across:
        held = [row | {"prompt": f"{n}: "} for n, row in enumerate(held)]
    write(place / "held.jsonl", held)
    given = {"train_file": place / "judged.jsonl", "validation_file": place / "held.jsonl"}
    run = place / f"kto-{across}"
    assert kto.main(words(place, run.name, **given, num_epochs=3, eval_prompts=0)) == 0

    model, tokenizer = base_model.load(place / "tiny-base", "float32", "cpu")
    model = PeftModel.from_pretrained(model, str(run / "adapter"))
    rewards = []
    for row in held:
        example = render_answer(tokenizer, row["prompt"], row["completion"])
        ids = torch.tensor([example.input_ids])
        learned = torch.tensor(example.labels[1:]) != -100
        with torch.no_grad():
            ours = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                theirs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        gain = (ours - theirs).gather(-1, ids[0, 1:, None]).squeeze(-1)[learned]
        rewards.append(float(gain.sum()))
    judged = list(zip(held, rewards, strict=True))
    pairs = [
        (good, bad)
        for first, good in judged
        for second, bad in judged
        if first["label"] and not second["label"]
        if across or first["prompt"] == second["prompt"]
    ]
    wanted = sum((good > bad) + (good == bad) / 2 for good, bad in pairs) / len(pairs)
    found = outcome(run)
    assert found["held_out"]["pairs"] == len(pairs) == (72 if across else 8)
    assert found["held_out"]["across_prompts"] == across
    assert found["held_out"]["accuracy"] == pytest.approx(wanted, abs=1e-9)
    assert found["gate"]["promote"] == (wanted > 0.5)
    assert "comparison" not in found  # no prompt was to be answered
    assert any("eval_rewards/chosen" in record for record in records(run))


@pytest.fixture(scope="module")
def judged_by(place) -> Path:
    given = files(place) | {"num_epochs": 3, "validation_fraction": 0}
    assert reward.main(reward_words(place, "judge", **given)) == 0
    return place / "judge"


def test_a_reward_model_says_which_answers_are_better(place, judged_by):
    judge = {"reward_model": judged_by / "adapter"}
    assert dpo.main(words(place, "compared", **files(place), **OF_DPO, **judge)) == 0
    found = outcome(place / "compared")
    scores = {kind: [] for kind in ("start", "final")}
    for row in answers(place / "compared"):
        scores[row["kind"]].append(row["score"])
    both = list(zip(*scores.values(), strict=True))
    wins = sum((after > before) + (after == before) / 2 for before, after in both)
    assert found["comparison"]["win_rate"] == wins / 5
    assert found["comparison"]["end"]["reward"] == pytest.approx(sum(scores["final"]) / 5)
    told = " ".join(found["gate"]["reasons"])
    assert "reward" in told
    assert gate(found) == found["gate"]


def test_an_unfinished_run_may_be_judged_by_another_model(place, judged_by):
    given = files(place) | OF_DPO | {"reward_model": judged_by / "adapter"}
    assert dpo.main(words(place, "rejudged", **given)) == 0
    (place / "rejudged/result.json").unlink()
    shutil.copytree(judged_by / "adapter", place / "second")
    scale = json.loads((place / "second/reward.json").read_text())
    (place / "second/reward.json").write_text(json.dumps(scale, indent=4))
    assert dpo.main(words(place, "rejudged", **given | {"reward_model": place / "second"})) == 0


@pytest.mark.parametrize(
    ("values", "status", "told"),
    [
        ({"reward_model": "judge/adapter", "validation_fraction": 0}, 2, "validation_fraction is"),
        ({"reward_model": "judge/adapter", "eval_prompts": 0}, 2, "eval_prompts is 0"),
        ({"reward_model": "nowhere"}, 2, "nowhere is no reward model"),
        ({"reward_model": "judge/adapter", "base_model": "other-base"}, 1, "train both on one"),
        ({"reward_model": "broken"}, 1, "broken/adapter_model.safetensors"),
        ({"reward_model": "judge/adapter", "train_file": "one.jsonl"}, 2, "too few decided rows"),
    ],
)
def test_a_reward_model_that_could_not_compare_is_refused_first(
    place, judged_by, values, status, told, capsys
):
    write(place / "one.jsonl", [row | {"prompt": "say: "} for row in vowel_rows(12)])
    shutil.copytree(judged_by / "adapter", place / "broken", dirs_exist_ok=True)
    (place / "broken/adapter_model.safetensors").write_bytes(b"{}")
    paths = {name: place / text for name, text in values.items() if isinstance(text, str)}
    given = {"train_file": place / "train.jsonl"} | values | paths
    assert dpo.main(words(place, "refused", **given)) == status
    assert told in capsys.readouterr().err
    assert not (place / "refused/metrics.jsonl").exists()


def test_where_no_prompt_leaves_room_that_is_told(place):
    given = {"train_file": place / "train.jsonl", "max_new_tokens": 4000}
    assert dpo.main(words(place, "roomless", **given)) == 0
    events = (place / "roomless/events.jsonl").read_text()
    assert "leaves room for max_new_tokens (4000)" in events
    found = outcome(place / "roomless")
    assert "comparison" not in found
    assert set(found["gate"]) == {"promote", "reasons"}
