"""Bias reports: the statistics by hand, the measurement against transformers, jobs and routes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from api_server import MODEL, tiny_settings
from tiny_models import random_adapter, save_tiny_base, tiny_model, tiny_tokenizer
from train_runs import Workplace, write_rows
from working_server import working

from data import bias
from data.moderation import classifier
from data.settings import BiasLimits
from rlhf import reward
from serve.engine.base import AdapterRef
from serve.engine.local import LocalEngine
from train import bias as measuring


def test_texts_of_a_pair_differ_in_one_word() -> None:
    assert len(bias.PAIRS) == 72
    assert len(set(bias.SCORED)) == len(bias.SCORED)
    for pair in bias.PAIRS:
        words = [text.replace(".", "").split() for text in (pair.stereotyped, pair.other)]
        differing = [both for both in zip(*words, strict=True) if both[0] != both[1]]
        assert differing in ([("she", "he")], [("he", "she")])
    for probe in bias.PROBES:
        assert probe.group in probe.favourable
        assert probe.group in probe.unfavourable


def likelihoods(pairs: list[float], probes: dict[str, float]) -> list[float]:
    """Lay out log-likelihoods: each pair's difference, and each group's odds of bad words."""
    laid: list[float] = []
    for difference in pairs:
        laid += [difference - 10, -10]
    for probe in bias.PROBES:
        laid += [-20, probes.get(probe.group, 0.0) - 20]
    return laid


def test_shares_gaps_and_means_by_hand() -> None:
    pairs = [1.0] * 40 + [-0.5] * 20 + [0.0] * 12
    given = likelihoods(pairs, {"old": 2.0, "young": -1.0, "gay": 0.5})
    harm = [0.25] * len(bias.OPENINGS)
    flagged = [True, *([False] * (len(bias.OPENINGS) - 1))]
    found = bias.findings(given, ["x"] * len(harm), harm, flagged).summary()
    assert found["stereotyped_share"] == pytest.approx((40 + 6) / 72)
    low, high = found["stereotyped_interval"]
    assert low < 46 / 72 < high
    assert found["preference"] == pytest.approx(30 / 72)
    assert found["groups"]["age"] == {"log_odds": {"young": -1.0, "old": 2.0}, "gap": 3.0}
    assert found["groups"]["orientation"]["gap"] == 0.5
    assert found["groups"]["religion"]["gap"] == 0
    assert found["harm"] == 0.25
    assert found["flagged_share"] == pytest.approx(1 / len(bias.OPENINGS))


def side(share: float, gap: float, harm: float) -> dict[str, Any]:
    return {"stereotyped_share": share, "groups": {"age": {"gap": gap}}, "harm": harm}


def test_limits_name_what_rose_and_by_how_much() -> None:
    report = {"base": side(0.5, 1.0, 0.1), "tuned": side(0.75, 1.5, 0.05)}
    assert bias.reasons_against(report, {}) == []
    assert bias.reasons_against(report, {"stereotyped_rise": None, "gap_rise": 0.5}) == []
    [reason] = bias.reasons_against(report, {"stereotyped_rise": 0.1, "harm_rise": 0.0})
    assert "stereotyped pairs rose by 0.25" in reason
    assert "0.1 is allowed" in reason
    assert "50% -> 75%" in bias.in_words(report)


def test_an_adapter_is_measured_as_transformers_and_peft_would(tmp_path: Path) -> None:
    adapter = AdapterRef("a", str(random_adapter(tiny_model("llama"), tmp_path / "adapter", 3)))
    tokenizer = tiny_tokenizer()
    read = measuring.encoder(tokenizer)
    with LocalEngine(tiny_model("llama"), tokenizer, measuring.ENGINE) as engine:
        found = measuring.report(engine, read, adapter, "tiny", classifier.load())

    def preference(model: torch.nn.Module, pair: bias.Pair) -> float:
        sums = []
        for text in (pair.stereotyped, pair.other):
            ids = torch.tensor([read(text)])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(scores.gather(-1, ids[0, 1:, None]).sum().item())
        return sums[0] - sums[1]

    from peft import PeftModel

    tuned = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter"))
    for name, model in (("base", tiny_model("llama")), ("tuned", tuned)):
        wanted = [preference(model.eval(), pair) for pair in bias.PAIRS]
        assert found[name]["preference"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
        share = sum((value > 0) + (value == 0) / 2 for value in wanted) / len(wanted)
        assert found[name]["stereotyped_share"] == pytest.approx(share, abs=0.03)
    assert len(found["continuations"]) == len(bias.OPENINGS)
    assert found["change"]["preference"]["p_value"] <= 1
    json.dumps(found)


def test_the_command_measures_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "tiny-base"
    save_tiny_base(base, "llama")
    random_adapter(tiny_model("llama"), tmp_path / "adapter", 1)
    words = ["--adapter", str(tmp_path / "adapter"), "--base-model", str(base)]
    words += ["--models-dir", str(tmp_path / "models"), "--dtype", "float32"]
    assert measuring.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["object"] == "bias_report"
    assert measuring.main(words) == 0
    assert "Bias beside the base" in capsys.readouterr().out
    assert measuring.main([*words[2:], "--adapter", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err


def test_a_run_leaves_its_report_beside_the_adapter(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    status, run = place.run("run", bias_report=True, num_epochs=1)
    assert status == 0
    report = json.loads((run / "adapter" / bias.FILE).read_text("utf-8"))
    assert report["counts"] == {"pairs": 72, "probes": 51, "openings": 17}


def test_a_reward_model_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"train_file={tmp_path}", f"output_dir={tmp_path / 'run'}", "bias_report=true"]
    assert reward.main(words) != 0
    assert "a reward model writes no text" in capsys.readouterr().err


def test_a_limit_shuts_the_gate_and_keeps_what_else_was_against() -> None:
    report = {"base": side(0.5, 1.0, 0.1), "tuned": side(0.75, 1.5, 0.05)}
    limits = BiasLimits(stereotyped_rise=0.1).model_dump()
    assert bias.limited(None, None, limits) is None
    assert bias.limited({"promote": True, "reasons": ["won"]}, report, {}) == {
        "promote": True,
        "reasons": ["won"],
    }
    shut = bias.limited({"promote": True, "reasons": ["won"]}, report, limits)
    assert shut is not None
    assert not shut["promote"]
    assert len(shut["reasons"]) == 1
    worse = bias.limited({"promote": False, "reasons": ["lost"]}, report, limits)
    assert worse is not None
    assert worse["reasons"][0] == "lost"
    assert len(worse["reasons"]) == 2


def test_a_job_measures_tells_and_hands_out(tmp_path: Path) -> None:
    with working(tiny_settings(tmp_path, bias_reports=True)) as server:
        client, http = server.client(), server.http()
        rows = write_rows(tmp_path / "rows.jsonl").read_bytes()
        file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=MODEL, training_file=file.id, hyperparameters={"n_epochs": 1}
        )
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in (
            "succeeded",
            "failed",
        ):
            time.sleep(0.2)
        assert job.status == "succeeded", job.error
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert any(message.startswith("Bias beside the base") for message in events)
        path = f"/v1/models/{job.fine_tuned_model}/bias_report"
        report = http.get(path).json()
        assert report["object"] == "bias_report"
        assert report["model"] == job.fine_tuned_model
        assert report["base_model"] == MODEL
        _, other = server.new_account("other")
        assert server.http(other).get(path).status_code == 404
        imported = random_adapter(tiny_model("llama"), tmp_path / "imported", 1)
        files = {
            "config": (imported / "adapter_config.json").read_bytes(),
            "weights": (imported / "adapter_model.safetensors").read_bytes(),
        }
        name = http.post("/v1/adapters", files=files).json()["id"]
        absent = http.get(f"/v1/models/{name}/bias_report")
        assert absent.status_code == 404
        assert absent.json()["error"]["code"] == "bias_report_not_found"
