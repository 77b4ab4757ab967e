"""Moving an account to a new base: what is run again, what is skipped, and who serves what then."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_trainer
import fake_worker
import pytest
from train_runs import write_rows
from typer.testing import CliRunner

from data import accounts, caps, jobs, presence, registry, upgrades
from data.errors import ModelNotFound, NotFound
from data.job_spec import JobSpec
from data.settings import Settings
from data.tables import Job, Project
from data.upgrades import Bases, Undone
from serve.cli import app
from serve.commands import upgrade as upgrade_command
from train import job_outcome
from train.job_config import write_config
from train.worker import Worker, open_workshop
from train.workshop import Workshop

OLD, NEW = "smollm2-135m-instruct", "qwen3-0.6b"
BASES = Bases(OLD, NEW, OLD, NEW)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    shop = fake_worker.make_shop(tmp_path / "home")
    yield shop
    shop.stopping.set()
    shop.database.close()


@pytest.fixture
def project(shop: Workshop) -> Project:
    return accounts.create_account(shop.database, "acme")[0]


def upload(shop: Workshop, project: Project, name: str = "train.jsonl") -> str:
    rows = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(12)]
    text = "\n".join(rows).encode() + b"\n"
    return shop.files.create(project.id, [text], name, "fine-tune").id


def tune(shop: Workshop, project: Project, suffix: str, **fields: Any) -> Job:
    spec = JobSpec(OLD, upload(shop, project), suffix=suffix, seed=7, **fields)
    return jobs.create(shop.database, project.id, spec, [OLD])


def work(shop: Workshop) -> None:
    Worker(shop).run(once=True)


def standings(shop: Workshop, project: Project) -> dict[str, str]:
    found = upgrades.plan(shop.database, project, BASES)
    return {recipe.version.split(":")[3]: recipe.standing for recipe in found}


def test_recipes_are_run_again_once_and_the_aliases_follow(
    shop: Workshop, project: Project
) -> None:
    options = {"lora": {"r": 8}, "prompt_loss_weight": 0.1}
    job = tune(shop, project, "a", hyperparameters={"n_epochs": 2}, options=options)
    tune(shop, project, "b")
    work(shop)
    (first, _) = plan = upgrades.plan(shop.database, project, BASES)
    assert [recipe.standing for recipe in plan] == ["due", "due"]
    assert first.aliases == [f"ft:{OLD}:acme:a"]
    assert first.rows == f"10% of {job.training_file}, which the old version learned"
    made = upgrades.start(shop.database, first, BASES)
    assert standings(shop, project) == {"a": "running", "b": "due"}
    assert (made.base, made.suffix, made.seed, made.training_file) == (
        NEW,
        "a",
        7,
        job.training_file,
    )
    assert made.hyperparameters["n_epochs"] == 2
    assert made.hyperparameters["batch_size"] == "auto"  # as asked, not as it became
    assert {name: made.options[name] for name in options} == options
    work(shop)
    assert standings(shop, project) == {"a": "promoted", "b": "due"}
    for alias in (f"ft:{OLD}:acme:a", f"ft:{NEW}:acme:a"):
        version = registry.resolve(shop.database, project.id, alias)
        assert version.base_model == NEW
        assert version.lineage["upgraded_from"] == first.version_id
    assert registry.resolve(shop.database, project.id, f"ft:{OLD}:acme:b").base_model == OLD


def upgraded(shop: Workshop, project: Project) -> tuple[upgrades.Recipe, str]:
    """Tune on the old base and upgrade; returns the recipe and the alias that moved."""
    tune(shop, project, "a")
    work(shop)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    upgrades.start(shop.database, recipe, BASES)
    work(shop)
    alias = f"ft:{OLD}:acme:a"
    return recipe, alias


def test_an_upgraded_alias_goes_back_and_each_server_serves_its_base(
    shop: Workshop, project: Project
) -> None:
    recipe, alias = upgraded(shop, project)
    new = registry.resolve(shop.database, project.id, alias)
    with shop.database.write() as session:  # the fake trainer knows one base only
        session.merge(new).base_fingerprint = "base-new"
    served = {
        base: registry.newest_of_base(shop.database, project.id, alias, base)
        for base in (fake_trainer.FINGERPRINT, "base-new", "base-third")
    }
    assert [v and v.base_model for v in served.values()] == [OLD, NEW, None]
    assert registry.newest_of_base(shop.database, "another", alias, "base-new") is None
    assert upgrades.undo(shop.database, project, BASES) == [Undone(alias, recipe.version)]
    assert registry.resolve(shop.database, project.id, alias).name == recipe.version
    assert registry.newest_of_base(shop.database, project.id, alias, "base-new") is None
    assert standings(shop, project) == {"a": "rolled_back"}
    registry.promote(shop.database, project.id, new.name, alias)
    assert standings(shop, project) == {"a": "promoted"}
    with pytest.raises(ModelNotFound):
        registry.promote(shop.database, project.id, new.name, "ft:other:alias:x")


def test_what_cannot_be_run_again_is_named(shop: Workshop, project: Project) -> None:
    gone = tune(shop, project, "gone")
    tune(shop, project, "start")
    work(shop)
    start = registry.resolve(shop.database, project.id, f"ft:{OLD}:acme:start")
    spec = JobSpec(start.name, upload(shop, project), suffix="more")
    jobs.create(shop.database, project.id, spec, [OLD])
    work(shop)
    shop.files.delete(project.id, gone.training_file)
    folder = shop.settings.home / "imported"
    fake_trainer.write_adapter(folder)
    given = (shop.database, shop.settings.adapters_dir, project, folder, OLD)
    registry.publish(*given, fake_trainer.FINGERPRINT, suffix="imported")
    told = {r.version.split(":")[3]: r for r in upgrades.plan(shop.database, project, BASES)}
    assert told["gone"].reason == f"its training file {gone.training_file} is gone"
    assert told["imported"].reason == "it was imported, so nothing says how it was trained"
    assert told["more"].reason.startswith("its job went on from another adapter")
    assert {told[name].standing for name in ("gone", "imported", "more")} == {"skipped"}
    assert told["start"].standing == "due"


def test_the_trainer_compares_with_the_old_base(shop: Workshop, project: Project) -> None:
    tune(shop, project, "a")
    work(shop)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    made = upgrades.start(shop.database, recipe, BASES)
    run = shop.run_of(made)
    run.path.mkdir(parents=True)
    current = shop.place_current(made)
    config = write_config(
        made, shop.settings, run, write_rows(run.path / "t.jsonl"), None, None, current
    )
    text = config.read_text("utf-8")
    assert f"base_model: {NEW}\n" in text
    assert f"compare_base: {OLD}\n" in text
    assert "validation_fraction: 0.1\n" in text
    assert (run.path / "data/compare_with/adapter_config.json").exists()
    config.unlink()
    plain = write_config(made, shop.settings, run, run.path / "t.jsonl", None, None, None)
    assert "compare_base" not in plain.read_text("utf-8")  # the old version is damaged, say
    registry.delete(shop.database, project.id, recipe.version)
    (run.path / "data/compare_with").rename(run.path / "elsewhere")
    with pytest.raises(NotFound, match="which it replaces, was deleted"):
        shop.place_current(made)


def test_a_failed_upgrade_is_due_again(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(shop, project, "a")
    work(shop)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    failed = upgrades.start(shop.database, recipe, BASES)
    jobs.request_cancel(shop.database, project.id, failed.id)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    assert recipe.standing == "due"
    assert recipe.reason == f"the last try, {failed.id}, ended so: cancelled"
    upgrades.start(shop.database, recipe, BASES)
    assert standings(shop, project) == {"a": "running"}


def test_an_upgrade_leaves_what_its_own_alias_names_on_the_new_base(
    shop: Workshop, project: Project
) -> None:
    old, new = f"ft:{OLD}:acme:a", f"ft:{NEW}:acme:a"
    tune(shop, project, "a")
    work(shop)
    folder = shop.settings.home / "trained"
    fake_trainer.write_adapter(folder)
    given = (shop.database, shop.settings.adapters_dir, project, folder, NEW)
    in_use = registry.publish(*given, fake_trainer.FINGERPRINT, suffix="a")
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    job = upgrades.start(shop.database, recipe, BASES)
    work(shop)
    first = registry.resolve(shop.database, project.id, old)
    assert first.base_model == NEW
    assert registry.resolve(shop.database, project.id, new).name == in_use.name
    events, _ = jobs.list_events(shop.database, project.id, job.id, 100)
    (told,) = [event.message for event in events if event.level == "warn" and new in event.message]
    assert told.startswith(f"{new} still names {in_use.name}, with which nothing was compared")
    registry.promote(shop.database, project.id, first.name)
    tune(shop, project, "a")
    work(shop)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    upgrades.start(shop.database, recipe, BASES)
    work(shop)
    second = registry.resolve(shop.database, project.id, old)
    assert registry.resolve(shop.database, project.id, new).name == second.name != first.name


def test_a_deleted_upgrade_gives_its_alias_back_and_is_due_again(
    shop: Workshop, project: Project
) -> None:
    recipe, alias = upgraded(shop, project)
    made = registry.resolve(shop.database, project.id, alias)
    registry.delete(shop.database, project.id, made.name)
    assert registry.resolve(shop.database, project.id, alias).name == recipe.version
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    assert (recipe.standing, recipe.aliases, recipe.moved) == ("due", [alias], [])
    failed = upgrades.start(shop.database, recipe, BASES)
    jobs.request_cancel(shop.database, project.id, failed.id)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    assert (recipe.standing, recipe.job_id) == ("due", failed.id)
    upgrades.start(shop.database, recipe, BASES)
    work(shop)
    assert standings(shop, project) == {"a": "promoted"}


def hone(home: Path, *words: str) -> Any:
    return CliRunner().invoke(app, words, env={"HONE_HOME": str(home)}, catch_exceptions=False)


def command(home: Path, *words: str) -> Any:
    return hone(home, "models", "upgrade", "--from", OLD, "--to", NEW, *words)


def test_the_command_plans_queues_once_and_undoes(shop: Workshop, project: Project) -> None:
    home = shop.settings.home
    tune(shop, project, "a")
    work(shop)
    (shown,) = json.loads(command(home, "--dry-run", "--json").output)
    assert (shown["standing"], shown["job_id"]) == ("due", None)
    (queued,) = json.loads(command(home, "--detach", "--json").stdout)
    (again,) = json.loads(command(home, "--detach", "--json", "-a", "acme").stdout)
    assert again["job_id"] == queued["job_id"]
    assert "No worker runs here" in command(home, "--detach").stderr
    work(shop)
    (done,) = json.loads(command(home, "--json").output)  # nothing to wait for
    assert (done["standing"], done["moved"]) == ("promoted", [f"ft:{OLD}:acme:a"])
    (moved,) = json.loads(command(home, "--undo", "--json").output)
    assert moved["alias"] == f"ft:{OLD}:acme:a"
    assert json.loads(command(home, "--undo", "--json").output) == []
    overruled = hone(home, "models", "promote", done["candidate"], "--alias", moved["alias"])
    assert overruled.output == f"{moved['alias']} -> {done['candidate']}\n"
    back = hone(home, "models", "promote", moved["version"])
    assert back.output == f"{moved['alias']} -> {moved['version']}\n"


def test_an_upgrade_that_bias_limits_refused_is_told_as_refused(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(shop, project, "a")
    work(shop)
    command(shop.settings.home, "--detach")
    shut: dict[str, Any] = {"promote": False, "reasons": ["harm rose by 0.2, more than 0.1"]}
    monkeypatch.setattr(job_outcome.bias, "limited", lambda *_: shut)
    work(shop)
    (recipe,) = upgrades.plan(shop.database, project, BASES)
    assert (recipe.standing, recipe.reason) == ("refused", shut["reasons"][0])


def test_who_waits_without_a_worker_is_told_so_first(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(shop, project, "a")
    work(shop)

    def watch(*_: Any, **__: Any) -> list[upgrades.Recipe]:
        print("watching", file=sys.stderr)
        return []

    monkeypatch.setattr(upgrade_command, "_watch", watch)
    first, second = command(shop.settings.home).stderr.splitlines()
    assert first.startswith("No worker runs here")
    assert second == "watching"
    with presence.announced(shop.settings.workers_dir, "host:1"):
        assert command(shop.settings.home).stderr == "watching\n"


def test_a_retry_that_a_cap_holds_back_is_waited_for(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("a", "b"):
        tune(shop, project, suffix)
    work(shop)
    for recipe in upgrades.plan(shop.database, project, BASES):
        failed = upgrades.start(shop.database, recipe, BASES)
        jobs.request_cancel(shop.database, project.id, failed.id)
    caps.set_caps(shop.database, project.id, shop.settings.limits, {"concurrent_jobs": 1})
    monkeypatch.setattr(upgrade_command, "time", SimpleNamespace(sleep=lambda _: work(shop)))
    done = command(shop.settings.home, "--json")
    assert [one["standing"] for one in json.loads(done.stdout)] == ["promoted"] * 2
    assert done.exit_code == 0


def test_undo_can_be_rehearsed_and_one_alias_holds_up_no_other(
    shop: Workshop, project: Project
) -> None:
    home = shop.settings.home
    for suffix in ("a", "b"):
        tune(shop, project, suffix)
    work(shop)
    old = {r.aliases[0]: r.version for r in upgrades.plan(shop.database, project, BASES)}
    command(home, "--detach")
    work(shop)
    first, second = (f"ft:{OLD}:acme:{suffix}" for suffix in ("a", "b"))
    registry.delete(shop.database, project.id, old[first])
    expected = [(first, None), (second, old[second])]
    for words, base in ((["--dry-run"], NEW), ([], OLD)):
        done = command(home, "--undo", "--json", *words)
        assert done.exit_code == 1
        told = json.loads(done.output)
        assert sorted((one["alias"], one["version"]) for one in told) == expected
        assert "no earlier version" in next(t for t in told if t["alias"] == first)["problem"]
        assert registry.resolve(shop.database, project.id, second).base_model == base
        assert registry.resolve(shop.database, project.id, first).base_model == NEW


@pytest.mark.slow
def test_an_upgrade_trains_compares_and_promotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import save_tiny_base

    places = {
        arch: str(save_tiny_base(tmp_path / f"tiny-{arch}", arch)) for arch in ("llama", "qwen2")
    }
    settings = Settings(home=tmp_path / "home", model=places["llama"], device="cpu")
    shop = open_workshop(settings)
    project = accounts.create_account(shop.database, "acme")[0]
    files = []
    for name, count in (("train.jsonl", 48), ("valid.jsonl", 16)):
        text = write_rows(tmp_path / name, count).read_bytes()
        files.append(shop.files.create(project.id, [text], name, "fine-tune").id)
    for suffix, valid in (("a", files[1]), ("b", None)):
        spec = JobSpec(
            "tiny-llama",
            files[0],
            valid,
            suffix=suffix,
            hyperparameters={"n_epochs": 1, "learning_rate_multiplier": 0.01},
        )
        jobs.create(shop.database, project.id, spec, ["tiny-llama"])
    work(shop)
    bases = Bases("tiny-llama", "tiny-qwen2", places["llama"], places["qwen2"])
    for recipe in upgrades.plan(shop.database, project, bases):
        upgrades.start(shop.database, recipe, bases)
    work(shop)
    for recipe in upgrades.plan(shop.database, project, bases):
        assert recipe.standing in ("promoted", "refused"), recipe
        assert recipe.candidate is not None
        version = registry.resolve(shop.database, project.id, recipe.candidate)
        assert version.base_model == "tiny-qwen2"
        compared = version.lineage["result"]["comparison"]
        assert compared["unit"] == "nats a byte"
        assert compared["rows"] == (16 if ":a:" in recipe.version else 5)
        assert compared["against"] == "the adapter in use, on tiny-llama"
    shop.database.close()
