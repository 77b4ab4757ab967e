"""Evaluation: metrics, comparison of two models, the regression gate, the report."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from test_rlhf_reward import vowel_rows, words, write
from tiny_models import tiny_tokenizer
from train_runs import Workplace, read_json, read_lines
from transformers import AutoModelForCausalLM

from data.errors import ConfigError, DataError, InvalidInput
from data.rows import PromptCompletion
from rlhf import reward
from rlhf.actor_critic import REWARD, ActorCritic
from rlhf.reward_model import read_head
from serve.engine import base_model
from train import evaluate, merged
from train.answer_metrics import METRICS, classification, token_f1
from train.evaluate_output import make_room
from train.questions import Question, read_questions
from train.significance import compare, p_value


def asked(*pairs: tuple[str, str]) -> list[Question]:
    """Make questions of (right answer, said)."""
    return [Question(line, (1,), [right], said) for line, (right, said) in enumerate(pairs, 1)]


def test_token_f1_by_hand() -> None:
    assert token_f1("The cat sat", "the cat") == pytest.approx(0.8)  # precision 2/3, recall 1
    assert token_f1("dog", "cat") == 0
    assert token_f1("a a b", "a") == pytest.approx(0.5)  # a word counts as often as it is there
    assert token_f1("", "") == 1
    assert token_f1("", "x") == 0


def test_the_nearest_right_answer_counts() -> None:
    question = Question(1, (1,), ["a dog", "the cat"], "The cat!")
    assert METRICS["f1"].value([question]) == 1
    assert METRICS["rouge_l"].value([question]) == 1
    assert METRICS["exact_match"].value([question]) == 0


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 3: "police killed the gunman" against two sentences of the same words
    first, second = asked(
        ("police killed the gunman", "police kill the gunman"),
        ("police killed the gunman", "the gunman kill police"),
    )
    assert METRICS["rouge_l"].value([first]) == pytest.approx(3 / 4)
    assert METRICS["rouge_l"].value([second]) == pytest.approx(2 / 4)


def test_rouge_l_knows_words_of_any_script() -> None:
    questions = asked(("Δευτέρα και Τρίτη", "δευτέρα και πέμπτη"), ("москва", "Москва."))
    assert METRICS["rouge_l"].scores(questions) == pytest.approx([2 / 3, 1])


def test_references_are_a_text_or_texts(tmp_path: Path) -> None:
    def answers(*references: Any) -> list[list[str]]:
        rows = [
            {"prompt": f"q{i}", "completion": "a", "references": given}
            for i, given in enumerate(references)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        numbered = [(i, PromptCompletion(f"q{i}", "a")) for i in range(1, len(rows) + 1)]
        return [found.answers for found in read_questions(path, tiny_tokenizer(), numbered)]

    assert answers("Paris", ["Rome", "Roma"], [], None) == [
        ["Paris"],
        ["Rome", "Roma"],
        *[["a"]] * 2,
    ]
    for wrong in (5, ["Rome", 5], {"a": "b"}):
        with pytest.raises(DataError, match=r'rows\.jsonl:2: "references" is .*give a string or'):
            answers("Paris", wrong)


def test_what_cannot_be_measured_is_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> str:
        assert evaluate.main(["--file", "absent.jsonl", *more]) == 2
        return capsys.readouterr().err

    with pytest.raises(SystemExit):
        told("--limit", "0")
    assert "0 is too few; give 1 or more" in capsys.readouterr().err
    assert "--answers needs a metric of answers" in told("--metric", "loss", "--answers", "x")
    for metric, module, package in (
        ("classification", "sklearn.metrics", "scikit-learn"),
        ("rouge_l", "rouge_score.rouge_scorer", "rouge-score"),
        ("chrf", "sacrebleu", "sacrebleu"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"needs {package}, which is not installed" in told("--metric", metric)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"):
        make_room(tmp_path / "file" / "answers.jsonl")


def test_free_answers_are_no_classes_and_nobody_is_asked(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(6)]
    path = place.folder / "free.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked_models: list[int] = []
    monkeypatch.setattr(evaluate.Evaluation, "answer", lambda *_: asked_models.append(1))
    words = ("--base-model", str(place.base), "--file", str(path), "--metric", "classification")
    assert evaluate.main([*words, "--threads", "1"]) == 2
    assert "6 different answers, which are no classes" in capsys.readouterr().err
    assert not asked_models


def test_classes_by_hand() -> None:
    questions = asked(
        ("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "what?"), ("b", "a"), ("a", " a ")
    )
    found = classification(questions)
    assert found["accuracy"] == pytest.approx(4 / 7)
    a, b = found["classes"]["a"], found["classes"]["b"]
    assert (a["precision"], a["recall"]) == (pytest.approx(3 / 4), pytest.approx(3 / 4))
    assert (b["precision"], b["recall"]) == (pytest.approx(1 / 2), pytest.approx(1 / 3))
    assert found["macro_f1"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert METRICS["classification"].value(questions) == found["macro_f1"]
    assert METRICS["classification"].scores(questions) == [1, 1, 0, 1, 0, 0, 1]


def test_free_texts_are_no_classes() -> None:
    with pytest.raises(ConfigError, match="measure exact_match or f1"):
        classification(asked(*((f"text {i}", "x") for i in range(9))))


def test_same_texts_score_all_there_is() -> None:
    questions = asked(("the cat sat on the mat", "the cat sat on the mat"))
    for name in ("bleu", "chrf"):
        assert METRICS[name].value(questions) == pytest.approx(100)
        assert METRICS[name].scores(questions) == [pytest.approx(1)]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_permutation_test_is_exact_for_few(gains: list[int]) -> None:
    signs = list(itertools.product((1, -1), repeat=len(gains)))
    sums = [abs(sum(s * g for s, g in zip(row, gains, strict=True))) for row in signs]
    exact = sum(value >= abs(sum(gains)) for value in sums) / len(sums)
    assert p_value(np.array(gains, dtype=float)) == pytest.approx(exact)


def test_the_permutation_test_of_many_is_the_sign_test_for_equal_steps() -> None:
    better, worse = 30, 14
    gains = np.array([1.0] * better + [-1.0] * worse)
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(worse + 1)) / 2**count
    assert p_value(gains) == pytest.approx(2 * tail, abs=0.006)  # of 10,000 draws


def test_what_a_comparison_says() -> None:
    same = compare([1, 0, 1], [1, 0, 1])
    assert (same.mean, same.p_value, same.same, same.is_significant) == (0, 1, 3, False)
    found = compare([0] * 12, [1] * 12)
    assert found.mean == 1
    assert found.p_value == pytest.approx(2 / 2**12)
    assert found.is_significant
    with pytest.raises(InvalidInput, match="2 scores against 1"):
        compare([1, 2], [1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"), "qwen3")


@pytest.fixture(scope="module")
def letters(place: Workplace) -> Path:
    """Rows that two random layers learn."""
    path = place.folder / "letters.jsonl"
    rows = [
        {"prompt": "x" * (index % 5) + answer[0].upper(), "completion": answer}
        for index in range(8)
        for answer in ("abc", "def", "ghi")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tuned(place: Workplace, letters: Path) -> Path:
    status, run = place.run(
        "tuned",
        train_file=letters,
        validation_file=letters,
        num_epochs=20,
        learning_rate=1e-2,
        score_examples=100,
        n_evals=2,
    )
    assert status == 0
    return run


def evaluated(
    place: Workplace, capsys: pytest.CaptureFixture[str], *words: object
) -> dict[str, Any]:
    base = ("--base-model", place.base, "--models-dir", place.folder / "models", "--json")
    base += ("--dtype", "float32")
    capsys.readouterr()
    assert evaluate.main([str(word) for word in (*base, *words, "--threads", 1)]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_one_long_answer_takes_no_room_from_other_questions(place: Workplace) -> None:
    evaluation = evaluate.Evaluation(str(place.base), [None], place.folder / "models", 1)
    evaluation.engine.max_context = most = 20
    try:

        def answer(length: int, max_tokens: int | None = None) -> int:
            questions = [Question(1, (5,) * length, ["a"]), Question(2, (5,), ["a" * 50])]
            evaluation.answer(questions, None, max_tokens, show=False)
            return len(questions[0].said_ids)

        assert 1 <= answer(most - 3) <= 3
        with pytest.raises(
            DataError, match=r"line 1: more than 19 tokens; the model reads 20"
        ) as e:
            answer(most)
        assert "--max-tokens" not in e.value.message
        with pytest.raises(DataError, match=r"line 1: more than 14 .*--max-tokens, which is 6$"):
            answer(most - 5, 6)
    finally:
        evaluation.close()


def accuracy_by_hand(place: Workplace, rows: Path) -> float:
    """Return the base's share of right tokens of the completions, by transformers."""
    model, tokenizer = base_model.load(place.base, "float32")
    right = []
    for row in read_lines(rows):
        ids = tokenizer(row["prompt"])["input_ids"]
        whole = ids + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            chosen = model(input_ids=torch.tensor([whole])).logits[0].argmax(-1)
        right += [int(chosen[at - 1]) == whole[at] for at in range(len(ids), len(whole))]
    return sum(right) / len(right)


def test_a_tuned_model_against_the_base(
    place: Workplace, letters: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = place.folder / "new" / "answers.jsonl"
    found = evaluated(
        place,
        capsys,
        *("--adapter", tuned / "adapter", "--against", "base", "--file", letters),
        *("--metric", "exact_match", "f1", "classification", "chrf", "loss", "token_accuracy"),
        *("--answers", answers),
    )
    assert found["exact_match"] == found["f1"] == found["classification"] == 1
    assert found["chrf"] == pytest.approx(100)
    assert found["classes"]["abc"] == {"precision": 1, "recall": 1, "f1": 1, "support": 5}
    other = found["against"]
    assert other["exact_match"] == 0
    difference = other["differences"]["exact_match"]
    assert difference["better"] == 15
    assert difference["significant"]
    assert difference["interval"] == [1, 1]
    assert other["differences"]["loss"]["mean"] > 0  # a loss that fell is a gain
    assert other["differences"]["classification"]["of"] == "accuracy"
    assert found["token_accuracy"] == 1
    assert other["token_accuracy"] == pytest.approx(accuracy_by_hand(place, letters))
    lines = read_lines(answers)
    assert len(lines) == 15
    assert all(line["said"].strip() in line["answers"] for line in lines)
    assert all(line["against_said"].strip() not in line["answers"] for line in lines)


def test_the_win_rate_by_a_reward_model(
    place: Workplace, letters: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are those that PPO gets: of transformers, PEFT and the head."""
    write(place.folder / "pairs.jsonl", vowel_rows())
    assert reward.main(words(place.folder, "judge", base_model=place.base, num_epochs=1)) == 0
    judge, answers = place.folder / "judge/adapter", place.folder / "scored.jsonl"
    asked = ("--adapter", tuned / "adapter", "--against", "base", "--file", letters)
    judged = ("--metric", "reward", "--reward-model", judge, "--answers", answers)
    found = evaluated(place, capsys, *asked, *judged, "--max-tokens", 6)
    difference = found["against"]["differences"]["reward"]
    assert difference["better"] + difference["worse"] + difference["same"] == 15
    assert difference["win_rate"] == (difference["better"] + difference["same"] / 2) / 15
    assert difference["mean"] == pytest.approx(found["reward"] - found["against"]["reward"])
    base, tokenizer = base_model.load(place.base, "float32")
    model = PeftModel.from_pretrained(base, str(judge), adapter_name=REWARD)
    roles = ActorCritic(model, 1.0)
    head = read_head(judge, read_json(judge / "hone.json")["base_fingerprint"])
    roles.add_head(REWARD, head.weight)
    rows = [json.loads(line) for line in letters.read_text().splitlines()]
    for line in read_lines(answers):
        ids = tokenizer(rows[line["line"] - 1]["prompt"] + line["said"])["input_ids"]
        with torch.no_grad():
            score = head.normalizer.apply(roles.rewards([[*ids, tokenizer.eos_token_id]]))
        assert line["scores"]["reward"] == pytest.approx(float(score), abs=1e-3)


def test_a_reward_needs_a_judge(
    place: Workplace, letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--file", str(letters), "--metric", "reward"]) == 2
    assert "--reward-model FOLDER` go together" in capsys.readouterr().err


def test_a_run_compares_itself_with_the_base(place: Workplace, tuned: Path) -> None:
    result = read_json(tuned / "result.json")
    assert result["gate"]["promote"]
    assert "with the base model" in result["gate"]["reasons"][0]
    found = result["comparison"]
    assert found["rows"] == found["difference"]["better"] == 24
    model, tokenizer = base_model.load(place.base, "float32")
    total = 0.0
    for line in place.folder.joinpath("letters.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["prompt"])["input_ids"]
        whole = ids + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        learned = range(len(ids), len(whole))
        total += -sum(float(scores[at - 1, whole[at]]) for at in learned) / len(learned)
    assert found["loss_before"] == pytest.approx(total / 24, abs=1e-4)


def test_a_worse_adapter_is_not_promoted(place: Workplace, letters: Path, tuned: Path) -> None:
    """One that hardly learned, against one that knows the rows by heart."""
    status, run = place.run(
        "worse",
        train_file=letters,
        validation_file=letters,
        num_epochs=1,
        learning_rate=1e-9,
        lora__r=2,
        compare_with=tuned / "adapter",
    )
    assert status == 0
    result = read_json(run / "result.json")
    assert not result["gate"]["promote"]
    assert "0 of 24 rows better, 24 worse" in result["gate"]["reasons"][0]
    known = read_json(tuned / "result.json")["comparison"]["loss_after"]
    assert result["comparison"]["loss_before"] == pytest.approx(known, abs=1e-5)
    weights = load_file(run / "adapter/adapter_model.safetensors")
    assert all(min(tensor.shape) == 2 for tensor in weights.values())  # its own, not the other's


def test_the_adapter_in_use_is_scored_without_its_dropout(place: Workplace, letters: Path) -> None:
    files = {"train_file": letters, "validation_file": letters}
    shape = {"num_epochs": 1, "learning_rate": 0.02}
    status, used = place.run("dropped", **files, **shape, lora__dropout=0.5)
    assert status == 0
    status, run = place.run("after", **files, **shape, compare_with=used / "adapter")
    assert status == 0
    known = read_json(used / "result.json")["comparison"]["loss_after"]
    found = read_json(run / "result.json")["comparison"]["loss_before"]
    assert found == pytest.approx(known, abs=1e-5)


def test_an_adapter_of_another_base_is_refused(place: Workplace, tmp_path: Path) -> None:
    tmp_path.joinpath("other").mkdir()
    other = Workplace(tmp_path / "other", "llama")
    status, run = other.run("first", num_epochs=1)
    assert status == 0
    status, run = place.run("refused", validation_fraction=0.2, compare_with=run / "adapter")
    assert status != 0
    assert "compare_with" in read_json(run / "error.json")["message"]
    assert not (run / "metrics.jsonl").exists()  # before anything was trained


def test_what_to_compare_with_may_change_in_an_unfinished_run(
    place: Workplace, tuned: Path
) -> None:
    status, run = place.run("mended", num_epochs=1, validation_fraction=0.2)
    assert status == 0
    (run / "result.json").unlink()
    status, _ = place.run(
        "mended", num_epochs=1, validation_fraction=0.2, compare_with=tuned / "adapter"
    )
    assert status == 0
    assert "the adapter in use" in read_json(run / "result.json")["gate"]["reasons"][0]


def test_the_report_holds_all_it_shows(place: Workplace, tuned: Path) -> None:
    text = (tuned / "report.html").read_text("utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text)  # drawings refer to themselves
    assert "<script" not in text
    for title in ("Outcome", "Curves", "Training data", "Won most", "Training rows to look at"):
        assert title in text
    assert "rows that repeat another</th><td>9</td>" in text


def test_rows_in_the_report_stay_text(place: Workplace, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "<script>alert(1)</script>", "completion": "<img src=x>"}
    rows.write_text(json.dumps(row) + "\n")
    words = {"train_file": rows, "min_examples": 1, "num_epochs": 1, "score_examples": 5}
    status, run = place.run("markup", **words)
    assert status == 0
    text = (run / "report.html").read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_lora_plus_moves_b_faster(place: Workplace) -> None:
    """AdamW's first step has the length of the rate: sixteen times as long for B."""
    moved = {}
    for ratio in (1, 16):
        status, run = place.run(
            f"ratio{ratio}",
            num_epochs=1,
            batch_size=24,
            learning_rate=1e-4,
            warmup_fraction=0,
            lora__lr_ratio=ratio,
        )
        assert status == 0
        moved[ratio] = load_file(run / "adapter/adapter_model.safetensors")
    for name, tensor in moved[1].items():
        if "lora_B" in name:
            torch.testing.assert_close(moved[16][name], 16 * tensor, rtol=1e-3, atol=1e-9)
        else:
            torch.testing.assert_close(moved[16][name], tensor, rtol=1e-4, atol=1e-8)


def test_dora_is_learned_and_merged(place: Workplace) -> None:
    status, run = place.run("dora", lora__use_dora=True, learning_rate=1e-2)
    assert status == 0
    probe = read_json(run / "adapter/probe.json")
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    assert peft.peft_config["default"].use_dora
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([probe["token_ids"][0]])
    with torch.no_grad():
        wanted, found = (model(input_ids=ids).logits for model in (peft, merged))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert any("serves as a base model" in e["message"] for e in read_lines(run / "events.jsonl"))


def test_a_merged_model_that_says_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [SimpleNamespace(logprob=value) for value in (-1.0, math.nan, -1.0)]
    completions = [SimpleNamespace(prompt_logprobs=(None, *scores))] * 2
    engine = SimpleNamespace(generate=lambda _: completions)
    monkeypatch.setattr(merged.LocalEngine, "open", lambda *_: nullcontext(engine))
    probe = {"token_ids": [[1, 2, 3, 4]] * 2, "logprobs": [[-1.0, -1.0, -1.5]] * 2}
    assert math.isnan(merged._worst(Path("merged"), "float32", "cpu", probe))


def test_a_broken_step_names_its_lines(place: Workplace) -> None:
    status, run = place.run(
        "nan", learning_rate=1e30, warmup_fraction=0, max_grad_norm=1e9, batch_size=4
    )
    assert status == 1
    message = read_json(run / "error.json")["message"]
    assert "the step's rows were lines " in message
