"""DPO, KTO, RLOO and GRPO on a tiny base: they learn, resume, and say what they cannot use."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_rlhf_reward import vowel_rows, write
from tiny_models import save_tiny_base
from train_runs import launch

from data.errors import TrainingFailed
from rlhf import dpo, group_run, grpo, kto, rloo
from rlhf.comparisons import load_comparisons
from rlhf.prompts import Prompt
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rollout import Sample
from serve.engine import base_model
from train.callbacks import STOPPED, Stopper
from train.run import RunFolder, step_of

RULE = """
def never(prompts, completions, **columns):
    return [None] * len(completions)
def counted(prompts, completions, **columns):
    with open(__file__ + ".count", "a") as stream:
        stream.write("".join(f"{prompt}\\n" for prompt in prompts))
    return vowels(prompts, completions)
def vowels(prompts, completions, **columns):
    return [10 * sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    save_tiny_base(folder / "tiny-base", "llama")
    write(folder / "pairs.jsonl", vowel_rows(80))
    write(folder / "prompts.jsonl", [{"prompt": f"say {i}: "} for i in range(20)])
    (folder / "rules_of_trl.py").write_text(RULE)
    return folder


def words(place: Path, out: str, **values: object) -> list[str]:
    given = {
        "base_model": place / "tiny-base",
        "models_dir": place / "models",
        "output_dir": place / out,
        "learning_rate": 3e-3,
        "batch_size": 8,
        "device": "cpu",
        "threads": 1,
        **values,
    }
    return [f"{name}={value}" for name, value in given.items()]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def margins(place: Path, adapter: Path) -> list[float]:
    """log p(chosen) - log p(rejected) of every pair, tuned minus base, by transformers and PEFT."""
    model, tokenizer = base_model.load(place / "tiny-base", "float32", "cpu")
    model = PeftModel.from_pretrained(model, str(adapter))
    found = []
    for group in load_comparisons(place / "pairs.jsonl", tokenizer, 1).groups:
        start = len(group.prompt)
        scores = []
        for ids in group.answers:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                tuned = model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
                with model.disable_adapter():
                    base = model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
            chosen = tokens[0, start:, None]
            scores.append(float((tuned - base).gather(-1, chosen).sum()))
        found += [scores[pair.better] - scores[pair.worse] for pair in group.pairs]
    return found


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_answers_that_were_preferred_become_likelier(place, method):
    main = {"dpo": dpo.main, "kto": kto.main}[method]
    given = words(place, method, train_file=place / "pairs.jsonl", num_epochs=2)
    assert main(given) == 0
    found = margins(place, place / method / "adapter")
    assert sum(margin > 0 for margin in found) > 0.8 * len(found)
    last = records(place / method)[-1]
    assert math.isfinite(last["valid_loss"])
    assert main(given) == 0  # done already: nothing is trained again


def test_the_first_loss_of_dpo_is_log_2(place):
    """The policy is the reference: every margin is 0."""
    assert dpo.main(words(place, "first", train_file=place / "pairs.jsonl", num_epochs=1)) == 0
    assert records(place / "first")[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_goes_on_from_an_adapter_which_is_its_reference(place):
    start = place / "dpo" / "adapter"
    if not start.exists():
        assert dpo.main(words(place, "dpo", train_file=place / "pairs.jsonl")) == 0
    given = words(place, "on", train_file=place / "pairs.jsonl", start_adapter=start)
    assert dpo.main(given) == 0
    assert records(place / "on")[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_rule_as_reward_rises(place, method, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    main = {"rloo": rloo.main, "grpo": grpo.main}[method]
    given = words(
        place,
        method,
        prompts_file=place / "prompts.jsonl",
        batch_size=32,
        total_episodes=960,
        max_new_tokens=8,
        beta=0.01,
        eval_prompts=5,
        **{"reward.function": "rules_of_trl:vowels", "reward.missing_eos_penalty": 0},
    )
    assert main(given) == 0
    scores = [record["reward"] for record in records(place / method) if "reward" in record]
    assert sum(scores[-6:]) > sum(scores[:6]) + 0.5
    result = json.loads((place / method / "result.json").read_text())
    assert set(result["gate"]) == {"promote", "reasons"}
    assert result["comparison"]["prompts"] == 5
    split = [f"time/{name}" for name in ("rollout", "score", "train")]
    steps = [record for record in records(place / method) if "reward" in record]
    assert all(0 <= step[name] <= result["seconds"] for step in steps for name in split)
    spent = sum(step[name] for step in steps for name in split)
    assert spent <= result["seconds"] + 0.1
    page = (place / method / "report.html").read_text()
    assert f"<h1>{method.upper()} run</h1>" in page
    assert page.count("<svg") == 8
    assert "Where the time went" in page


def test_evaluations_answer_the_prompts_of_their_file_and_change_nothing(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    write(place / "held.jsonl", [{"prompt": f"and now {i}: "} for i in range(3)])
    given = {
        "prompts_file": place / "prompts.jsonl",
        "total_episodes": 40,  # 5 steps
        "max_new_tokens": 8,
        "reward.function": "rules_of_trl:vowels",
        "reward.missing_eos_penalty": 0,
    }
    evaluated = {"eval_prompts_file": place / "held.jsonl", "eval_every": 2}
    assert grpo.main(words(place, "evaluated", **given, **evaluated)) == 0
    assert grpo.main(words(place, "unevaluated", **given, eval_prompts=0)) == 0

    found = {r["step"]: r for r in records(place / "evaluated") if "eval/reward" in r}
    assert list(found) == [2, 4, 5]
    steps = [r["step"] for r in records(place / "evaluated") if "reward" in r]
    assert steps == [1, 2, 3, 4, 5]  # an evaluation hides no step
    path = place / "evaluated" / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for step, kind in ((2, "eval"), (4, "eval"), (5, "final")):
        texts = [r["response"] for r in rows if (r["step"], r["kind"]) == (step, kind)]
        assert len(texts) == 3
        wanted = [10 * sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]
        assert found[step]["eval/reward"] == pytest.approx(sum(wanted) / 3, abs=1e-5)
    result = json.loads((place / "evaluated" / "result.json").read_text())
    assert result["comparison"]["end"]["reward"] == pytest.approx(found[5]["eval/reward"])
    weights = [
        place / out / "adapter/adapter_model.safetensors" for out in ("evaluated", "unevaluated")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_two_processes_end_with_one_adapter(place, method):
    given = {"train_file": place / "pairs.jsonl", "num_epochs": 1}
    if method == "grpo":
        given = {"prompts_file": place / "prompts.jsonl", "total_episodes": 24, "eval_prompts": 3}
        given |= {"reward.function": "rules_of_trl:vowels", "max_new_tokens": 6}
    out = f"two-{method}"
    assert launch(f"rlhf.{method}", words(place, out, **given), 2, [place]) == 0
    assert json.loads((place / out / "result.json").read_text())["status"] == "succeeded"
    steps = [record["step"] for record in records(place / out) if "train_loss" in record]
    assert steps == sorted(set(steps))  # one process writes
    assert (place / out / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("main", "rows", "told"),
    [
        (dpo.main, [{"prompt": "a", "completion": "b"}] * 12, "comparisons are preference rows"),
        (
            kto.main,
            [{"prompt": f"{i}", "completion": "b", "label": True} for i in range(12)],
            "good",
        ),
        (
            dpo.main,
            [row | {"label_prob": 0.5} for row in vowel_rows(12)],
            "every comparison is a tie",
        ),
    ],
)
def test_files_that_cannot_be_learned_from_are_refused(place, main, rows, told, capsys):
    path = write(place / "bad.jsonl", rows)
    assert main(words(place, "bad", train_file=path)) == 2
    assert told in capsys.readouterr().err


def test_label_smoothing_where_it_would_do_nothing_is_refused(place, capsys):
    given = words(place, "bad", train_file=place / "pairs.jsonl", label_smoothing=0.1)
    assert dpo.main(given) == 2
    assert "acts in loss_type robust only" in capsys.readouterr().err


@pytest.mark.parametrize("main", [rloo.main, grpo.main])
def test_what_groups_cannot_learn_from_is_told(place, main, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    given = {
        "prompts_file": place / "prompts.jsonl",
        "total_episodes": 16,
        "max_new_tokens": 8,
        "eval_prompts": 0,
        "reward.function": "rules_of_trl:never",
    }
    out = f"numberless-{main.__module__}"
    assert main(words(place, out, **given)) == 1
    message = json.loads((place / out / "error.json").read_text())["message"]
    assert "the function rules_of_trl:never gave no finite number for any of 8" in message
    assert "say" in message
    assert main(words(place, "refused", **given | {"max_new_tokens": 4000})) == 2
    assert "max_new_tokens is 4000, but tiny-base reads" in capsys.readouterr().err


@pytest.mark.parametrize("passes", [1, 2])
def test_every_prompt_is_asked_as_often_however_few_there_are(place, monkeypatch, passes):
    """Three prompts, four of them a step: TRL's own order would leave out what fills no step."""
    monkeypatch.syspath_prepend(str(place))
    write(place / "few.jsonl", [{"prompt": f"say {i}: "} for i in range(3)])
    counts = place / "rules_of_trl.py.count"
    counts.unlink(missing_ok=True)
    given = {
        "prompts_file": place / "few.jsonl",
        "batch_size": 16,
        "total_episodes": 48,
        "num_iterations": passes,
        "max_new_tokens": 4,
        "eval_prompts": 0,
        "reward.function": "rules_of_trl:counted",
    }
    assert rloo.main(words(place, f"few-{passes}", **given)) == 0
    result = json.loads((place / f"few-{passes}" / "result.json").read_text())
    assert result["steps"] == 3 * passes
    asked = Counter(counts.read_text().splitlines())
    assert asked == {f"say {i}: ": 16 for i in range(3)}


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_killed_run_goes_on_with_the_prompts_that_are_left(place, method, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    main = {"rloo": rloo.main, "grpo": grpo.main}[method]
    given = {
        "prompts_file": place / "prompts.jsonl",  # 20, of which a step takes 2
        "total_episodes": 8 * 16,
        "max_new_tokens": 4,
        "eval_prompts": 0,
        "save_every": 3,
        "dtype": "float32",
        "reward.function": "rules_of_trl:vowels",
    }
    whole, cut = f"whole-{method}", f"cut-{method}"
    assert main(words(place, whole, **given)) == 0
    mark = RunFolder.mark_complete

    def killed(self: RunFolder, step: int) -> None:
        mark(self, step)
        if step == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_complete", killed)
        with pytest.raises(KeyboardInterrupt):
            main(words(place, cut, **given))
    assert main(words(place, cut, **given)) == 0
    one, other = (
        load_file(place / out / "adapter/adapter_model.safetensors") for out in (whole, cut)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [RunFolder(place / out) for out in (whole, cut)]
    answers = [
        [(row["step"], row["prompt"], row["response"]) for row in run.read(run.completions)]
        for run in kept
    ]
    assert answers[0] == answers[1]


def test_a_run_that_is_told_to_stop_ends_with_a_batch(place, monkeypatch):
    """Its second pass would be one over another batch, sampled anew, where it goes on."""
    monkeypatch.syspath_prepend(str(place))
    given = {
        "prompts_file": place / "prompts.jsonl",
        "total_episodes": 4 * 8,
        "num_iterations": 2,
        "max_new_tokens": 4,
        "eval_prompts": 0,
        "dtype": "float32",
        "reward.function": "rules_of_trl:vowels",
    }
    assert grpo.main(words(place, "passes", **given)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "on_step_begin", lambda self, *_, **__: self.asked.set())
        assert grpo.main(words(place, "halted", **given)) == STOPPED
    assert step_of(RunFolder(place / "halted").newest_checkpoint()) == 2
    assert grpo.main(words(place, "halted", **given)) == 0
    one, other = (
        load_file(place / out / "adapter/adapter_model.safetensors") for out in ("passes", "halted")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_response_without_a_reward_is_left_out(tmp_path):
    prompt = Prompt(7, (1, 2), "say it", {})
    samples = [Sample(prompt, (3 + i,), "it", True, (-1.0,)) for i in range(3)]
    job = SimpleNamespace(
        config=SimpleNamespace(
            reward=PpoRewardSettings(function="m:f"), seed=0, max_new_tokens=4, temperature=1.0
        ),
        prompts=[prompt],
        roles=SimpleNamespace(policy_adapter=lambda: None),
        sampler=SimpleNamespace(sample=lambda *_: samples),
        source=SimpleNamespace(score=lambda _: [2.0, math.nan, 4.0]),
    )
    run = RunFolder(tmp_path)
    episodes = group_run.Episodes(job, run)
    episodes.step = 5
    ids = episodes.sample(["0"] * 3)
    assert episodes.score(["0"] * 3, ids) == [2.0, None, 4.0]
    (event,) = run.read(run.events)
    assert event["message"] == "1 responses without a finite reward skipped"
    assert event["step"] == 5

    job.source.score = lambda _: [math.nan] * 3
    for others, told in ((1, "5 responses"), (0, None)):  # of which the other process scored one
        reduced = torch.tensor([2, 2 + others])
        episodes.accelerator = SimpleNamespace(device="cpu", reduce=lambda x, _, r=reduced: x + r)
        if told:
            assert episodes.score(["0"] * 3, ids) == [None] * 3
            assert told in run.read(run.events)[-1]["message"]
        else:
            with pytest.raises(TrainingFailed):
                episodes.score(["0"] * 3, ids)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_an_old_checkpoint_stays_until_the_new_one_is_whole(place, method, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    main = {"dpo": dpo.main, "grpo": grpo.main}[method]
    given = {"keep_checkpoints": 1, "eval_prompts": 0}
    if method == "dpo":
        given |= {"train_file": place / "pairs.jsonl", "n_evals": 3}
    else:
        given |= {"prompts_file": place / "prompts.jsonl", "total_episodes": 32, "save_every": 2}
        given |= {"reward.function": "rules_of_trl:vowels", "max_new_tokens": 4}
    mark = RunFolder.mark_complete
    done = []

    def killed(self: RunFolder, step: int) -> None:
        if done:
            raise KeyboardInterrupt
        mark(self, step)
        done.append(step)

    out = f"kept-{method}"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_complete", killed)
        with pytest.raises(KeyboardInterrupt):
            main(words(place, out, **given))
    newest = RunFolder(place / out).newest_checkpoint()
    assert newest is not None
    assert step_of(newest) == done[0]
    assert main(words(place, out, **given)) == 0
    assert len(list((place / out / "checkpoints").glob("checkpoint-*"))) == 1


def test_checkpoints_come_every_so_many_steps(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    given = {
        "prompts_file": place / "prompts.jsonl",
        "total_episodes": 56,  # 7 steps
        "max_new_tokens": 4,
        "eval_prompts": 0,
        "reward.function": "rules_of_trl:vowels",
        "keep_checkpoints": 9,
    }
    assert grpo.main(words(place, "saved", **given, save_every=3)) == 0
    steps = {
        int(path.name.rpartition("-")[2]) for path in (place / "saved").glob("**/checkpoint-*")
    }
    assert steps == {3, 6, 7}
