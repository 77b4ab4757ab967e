"""Sweeps: which trials are made, how they are ranked, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_trainer
import pytest
from train_runs import Workplace, read_json, signals_restored, write_rows

from data import accounts, registry, upgrades
from data.adapter_checks import check_adapter
from data.db import Database
from data.errors import ConfigError, DataError
from data.job_spec import JobSpec
from data.settings import Settings
from data.tables import AdapterVersion
from data.upgrades import Bases
from serve.commands import tune as tune_command
from serve.engine import base_model
from train import sweep, tune
from train.config import auto_learning_rate
from train.run import RunFolder
from train.sweep import AXES, plan_sweep

ROOT = Path(__file__).parents[1]
WORDS = ["train_file=t.jsonl", "output_dir=out"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def words(place: Workplace, name: str, *more: str) -> list[str]:
    return [*place.words(name, num_epochs=2), *more]


def run(place: Workplace, name: str, *more: str) -> tuple[int, Path]:
    with signals_restored():
        return tune.main(words(place, name, *more)), place.folder / name


@pytest.fixture(scope="module")
def swept(place: Workplace) -> Path:
    """Four trials, of which two diverge."""
    status, folder = run(place, "swept", "learning_rate=2e-3,1e30", "lora.r=2,4", "lora.alpha=8")
    assert status == 0
    return folder


def test_trials_are_ranked_by_validation_loss(swept: Path) -> None:
    found = read_json(swept / "tune.json")
    trials = found["trials"]
    assert [t["status"] for t in trials] == ["succeeded", "succeeded", "failed", "failed"]
    assert trials[0]["valid_loss"] <= trials[1]["valid_loss"]
    assert {t["settings"]["lora.r"] for t in trials[:2]} == {"2", "4"}
    assert all(t["settings"]["learning_rate"] == "1e30" for t in trials[2:])
    assert "not finite" in trials[2]["message"] or "loss is" in trials[2]["message"]
    for trial in trials[:2]:
        result = read_json(swept / f"trial-{trial['trial']:02}/result.json")
        assert result["valid_loss"] == trial["valid_loss"]
    assert found["best"] == trials[0]


def test_the_best_adapter_is_kept_and_serves(place: Workplace, swept: Path) -> None:
    best = read_json(swept / "tune.json")["best"]
    origin = read_json(swept / "adapter/hone.json")
    facts = check_adapter(swept / "adapter", origin["base_fingerprint"])
    assert facts.rank == int(best["settings"]["lora.r"])
    weights = (swept / "adapter/adapter_model.safetensors").read_bytes()
    trial = swept / f"trial-{best['trial']:02}"
    assert weights == (trial / "adapter/adapter_model.safetensors").read_bytes()
    assert not (trial / "checkpoints").exists()


def test_all_trials_are_validated_on_the_same_rows(swept: Path) -> None:
    data = [read_json(path) for path in sorted(swept.glob("trial-*/resolved_config.json"))]
    assert len({json.dumps(one["validation_data"]) for one in data}) == 1
    assert data[0]["validation_data"]["examples"] == 2  # a tenth of 24
    assert data[0]["train_data"]["examples"] == 22


def test_a_job_can_be_made_of_the_best(swept: Path) -> None:
    found = read_json(swept / "tune.json")
    job = found["job"]
    held_out = {"early_stopping", "n_evals", "validation_fraction"}  # there was no file
    assert found["not_for_jobs"].keys() == {"dtype", *held_out}
    seed = job.pop("seed")
    hyperparameters = job.pop("hyperparameters")
    by_rule = auto_learning_rate(1_000_000)  # of a base of up to 0.3 billion parameters
    assert hyperparameters["learning_rate_multiplier"] == pytest.approx(2e-3 / by_rule)
    assert hyperparameters["n_epochs"] == 2
    assert job["lora"] == {"r": int(found["best"]["settings"]["lora.r"]), "alpha": 8}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    JobSpec("model", "file-1", method=method, seed=seed, options=job)  # accepts it


def test_what_a_job_takes_of_a_trial_and_what_it_does_not(swept: Path) -> None:
    more = ("validation_file=v.jsonl", "weight_decay=0.1", "lr_scheduler=linear", "on_long=drop")
    config = plan_sweep([*WORDS, *more, "lora.use_dora=false"], None, 0).configs[0]
    job = sweep._job(config, RunFolder(swept / "trial-01"))
    options = {name: job[name] for name in job.keys() - {"hyperparameters", "seed"}}
    assert options["on_long"] == "drop"
    assert options["n_evals"] == 8
    JobSpec("model", "file-1", "file-2", options=options)  # accepts it
    assert sweep._not_for_jobs(config) == {"weight_decay": 0.1, "lr_scheduler": "linear"}


def test_a_file_that_changed_is_another_sweep(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    words = [f"train_file={rows}", f"output_dir={tmp_path / 'out'}"]
    plan_sweep(words, None, 0).begin()
    plan_sweep(words, None, 0).begin()
    write_rows(rows, 25)
    with pytest.raises(ConfigError, match="holds a sweep of other content of train_file"):
        plan_sweep(words, None, 0).begin()
    rows.unlink()
    with pytest.raises(DataError, match=r"train_file .* is not a file"):
        plan_sweep(words, None, 0).begin()


def test_the_same_command_goes_on_and_another_sweep_is_refused(
    place: Workplace, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("learning_rate=2e-3,1e30", "lora.r=2,4", "lora.alpha=8", "--json")
    before = (swept / "trial-01/result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(place, "swept", *again)[0] == 0
    assert (swept / "trial-01/result.json").stat().st_mtime_ns == before
    assert json.loads(capsys.readouterr().out)["best"] == read_json(swept / "tune.json")["best"]
    assert run(place, "swept", "lora.r=2,8")[0] == 2
    assert "holds another sweep" in capsys.readouterr().err


def test_where_no_trial_has_a_result(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    status, folder = run(place, "none", "learning_rate=1e29,1e30")
    assert status == 1
    assert read_json(folder / "tune.json")["best"] is None
    assert "No trial has a result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "count", "axes"),
    [
        ([], 6, ("learning_rate_multiplier", "lora.r")),
        (["lora.r=16"], 3, ("learning_rate_multiplier",)),
        (["start_adapter=runs/a/adapter"], 3, ("learning_rate_multiplier",)),
        (["num_epochs=1,2,3"], 3, ("num_epochs",)),
        (["lora.use_rslora=true,false", "batch_size=4,8"], 4, ("lora.use_rslora", "batch_size")),
        (["lora.target_modules=[q_proj,v_proj]", "lora.r=4,8"], 2, ("lora.r",)),
    ],
)
def test_the_grid(more: list[str], count: int, axes: tuple[str, ...]) -> None:
    sweep = plan_sweep([*WORDS, *more], None, 0)
    assert len(sweep.configs) == len(sweep.settings) == count
    assert sweep.axes == axes
    assert len({config.output_dir for config in sweep.configs}) == count
    for config in sweep.configs:
        assert config.early_stopping.enabled
        assert config.validation_fraction == 0.1


def test_a_random_part_of_the_grid() -> None:
    many = [*WORDS, "lora.r=1,2,4,8,16", "num_epochs=1,2,3,4", "batch_size=2,4,8"]
    first, same, other = (plan_sweep(many, 7, seed) for seed in (0, 0, 1))
    assert len(first.settings) == 7
    assert len({json.dumps(one) for one in first.settings}) == 7
    assert first.settings == same.settings != other.settings
    with pytest.raises(ConfigError, match="are 60 trials; give fewer values, or --trials N"):
        plan_sweep(many, None, 0)


def test_a_validation_file_replaces_the_held_out_rows() -> None:
    sweep = plan_sweep([*WORDS, "validation_file=v.jsonl"], None, 0)
    assert sweep.configs[0].validation_fraction == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["seed=1,2"], "seed cannot have several values"),
        (["max_length=8,16"], "ranked by losses of different texts"),
        (["lora.r=4,,8"], "empty or repeated value"),
        (["lora.r=4,4"], "empty or repeated value"),
        (["lora.r=4,x"], "lora.r"),
        (["lora.rank=4"], "lora.r"),
        (["nonsense"], "is not key=value"),
        (["early_stopping.enabled=false"], "must stay true"),
    ],
)
def test_wrong_words_are_told(more: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan_sweep([*WORDS, *more], None, 0)


def test_every_axis_is_a_setting() -> None:
    values = {"lr_scheduler": "linear", "lora.use_rslora": "true"}
    for axis in AXES:
        below_one = axis in ("warmup_fraction", "lora.dropout")
        plan_sweep([*WORDS, f"{axis}={values.get(axis, '0.5' if below_one else '1')}"], 1, 0)


def hone(home: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HONE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_hone_tune_publishes_the_best(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_MODEL", str(place.base))
    home = tmp_path / "home"
    assert hone(home, "accounts", "create", "acme").returncode == 0
    valid = write_rows(tmp_path / "valid.jsonl", 6)
    done = hone(
        *(home, "tune", place.rows, "lora.r=2,4", "num_epochs=1", "threads=1"),
        *("--validation", valid, "--publish", "-a", "acme", "--suffix", "swept", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["trials"]) == 2
    assert ":acme:swept:" in found["model"]
    listed = hone(home, "models", "list", "--json")
    assert [one["name"] for one in json.loads(listed.stdout)] == [found["model"]]


def test_publishing_honours_the_gate_and_keeps_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    database = Database(settings.effective_database_url)
    database.migrate()
    project = accounts.create_account(database, "acme")[0]
    monkeypatch.setattr(base_model, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(base_model, "fingerprint", lambda _: fake_trainer.FINGERPRINT)
    fake_trainer.write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/probe.json").write_text("{}")
    resolved = {"config": {"compare_with": None}, "train_data": {"sha256": "5ac1"}}
    (tmp_path / "resolved_config.json").write_text(json.dumps(resolved))

    def publish(promote: bool) -> tuple[AdapterVersion, Any]:
        gate = {"promote": promote, "reasons": ["the rows say so"]}
        (tmp_path / "result.json").write_text(json.dumps({"gate": gate}))
        given = (settings, database, project, tmp_path, {"run": str(tmp_path)}, "swept")
        done = tune_command._publish(*given)
        return registry.resolve(database, project.id, done["model"]), done["gate"]

    worse, gate = publish(False)
    assert gate == {"promote": False, "reasons": ["the rows say so"]}
    assert registry.list_aliases(database, project.id) == []
    assert (settings.adapters_dir / worse.path / "probe.json").exists()
    assert worse.lineage["resolved"] == resolved
    better, gate = publish(True)
    (alias,) = registry.list_aliases(database, project.id)
    assert (alias.version_id, better.lineage["gate"]) == (better.id, gate)
    _, gate = publish(True)
    assert "compared with the base only" in gate["reasons"][-1]
    assert registry.list_aliases(database, project.id)[0].version_id == better.id
    bases = Bases(better.base_model, "other", "", "")
    (recipe,) = upgrades.plan(database, project, bases)
    assert recipe.reason.startswith("no job made it, but `hone tune`")
    database.close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent.jsonl"], "FILE absent.jsonl is not a file"),
        (["ROWS", "--validation", "v.jsonl"], "--validation v.jsonl is not a file"),
        (["ROWS", "-a", "acme"], "belong to --publish"),
        (["ROWS", "output_dir=x"], "output_dir is given by --output"),
        (["ROWS", "--publish", "-a", "acme", "base_model=x"], "set HONE_MODEL"),
        (["ROWS", "--publish", "--suffix", "a:b"], "suffix"),
        (["ROWS", "--publish", "-a", "nobody"], 'No account "nobody"'),
        (["ROWS", "lora.rank=2,4"], "lora.rank"),
    ],
)
def test_hone_tune_refuses(place: Workplace, tmp_path: Path, words: list[str], told: str) -> None:
    given = [str(place.rows) if word == "ROWS" else word for word in words]
    done = hone(tmp_path / "home", "tune", *given)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
