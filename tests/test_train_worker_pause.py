"""Pausing a job at any moment, what its checkpoints become, and what its trainer is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_worker
import pytest
from sqlalchemy import select
from test_train_worker import (
    MODEL,
    ROWS,
    add_job,
    behave,
    check_succeeded,
    checkpoint_told,
    messages_of,
    project,
    shop,
    status_of,
    trainers_of,
    wait_for,
    worker_process,
    worker_thread,
)

from data import accounts, adapter_folders, job_pause, jobs, registry
from data.errors import InvalidInput
from data.settings import read_config
from data.tables import AdapterVersion, Job, Project
from train.config import SftConfig
from train.worker import Worker
from train.workshop import Workshop

__all__ = ["behave", "project", "shop"]  # fixtures
ROW = json.dumps({"prompt": "a"})


def pause(shop: Workshop, job: Job) -> None:
    assert job_pause.pause(shop.database, job.project_id, job.id).status == "paused"


def resume(shop: Workshop, job: Job) -> None:
    assert job_pause.resume(shop.database, job.project_id, job.id).status == "queued"


def holder(shop: Workshop, job: Job) -> str | None:
    return jobs.get(shop.database, job.project_id, job.id).worker_id


@pytest.mark.parametrize("fault", [None, "deaf"])
def test_a_running_job_pauses_frees_the_slot_and_goes_on(
    shop: Workshop, project: Project, behave: Callable[..., None], fault: str | None
) -> None:
    behave(steps=20, step_s=0.4, fault=fault)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 2))
        asked = time.monotonic()
        pause(shop, job)
        wait_for(lambda: holder(shop, job) is None)
        assert time.monotonic() - asked < 10
        assert not trainers_of(shop, job)
        behave(steps=20, step_s=0.02)
        other = add_job(shop, project)
        wait_for(lambda: status_of(shop, other) == "succeeded")
        left = jobs.get(shop.database, project.id, job.id)
        assert (left.status, left.attempts, left.estimated_finish) == ("paused", 0, None)
        resume(shop, job)
        wait_for(lambda: status_of(shop, job) == "succeeded")
    told = messages_of(shop, job)
    assert "Fine-tuning job resumed" in told
    assert any(text.startswith("Training goes on from the checkpoint of step ") for text in told)
    assert told.count("Fine-tuning job started") == 1


def test_resuming_before_the_worker_has_let_go(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(step_s=0.3)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 2))
        pause(shop, job)
        resume(shop, job)
        wait_for(lambda: status_of(shop, job) == "succeeded")
    check_succeeded(shop, job)


def test_a_paused_job_survives_kill_9(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(step_s=0.3)
    job = add_job(shop, project)
    with worker_process(shop) as process:
        wait_for(lambda: checkpoint_told(shop, job, 2))
        pause(shop, job)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    wait_for(lambda: not trainers_of(shop, job), timeout_s=5)
    Worker(shop).run(once=True)
    assert status_of(shop, job) == "paused"
    resume(shop, job)
    behave(step_s=0.02)
    wait_for(lambda: finished(shop, job))
    check_succeeded(shop, job)


def finished(shop: Workshop, job: Job) -> bool:
    Worker(shop).run(once=True)
    return status_of(shop, job) == "succeeded"


def test_a_job_paused_before_its_files_were_checked(shop: Workshop, project: Project) -> None:
    good, bad = add_job(shop, project), add_job(shop, project, [ROW] * 12)
    for job in (good, bad):
        pause(shop, job)
    Worker(shop).run(once=True)
    assert {status_of(shop, good), status_of(shop, bad)} == {"paused"}
    for job in (good, bad):
        resume(shop, job)
    Worker(shop).run(once=True)
    assert "Files validated" in messages_of(shop, good)
    check_succeeded(shop, good)
    failed = jobs.get(shop.database, project.id, bad.id)
    assert failed.error is not None
    assert failed.error["code"] == "invalid_training_file"


def test_a_finished_run_is_published_when_it_goes_on(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner pauses in the moment between the trainer's end and the publication."""
    from train import job_outcome

    table = job_outcome.step_metrics_csv

    def late(path: Any) -> bytes:
        monkeypatch.undo()
        pause(shop, job)
        return table(path)

    job = add_job(shop, project)
    monkeypatch.setattr(job_outcome, "step_metrics_csv", late)
    Worker(shop).run(once=True)
    assert (status_of(shop, job), holder(shop, job)) == ("paused", None)
    resume(shop, job)
    Worker(shop).run(once=True)
    check_succeeded(shop, job)


def test_a_finished_run_that_finds_no_room_is_paused_and_published_later(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import job_outcome

    def full(_: Any) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = add_job(shop, project)
    with monkeypatch.context() as patch:
        patch.setattr(job_outcome, "step_metrics_csv", full)
        Worker(shop).run(once=True)
    assert (status_of(shop, job), holder(shop, job)) == ("paused", None)
    assert "is full; free some space and resume the job" in messages_of(shop, job)[-1]
    resume(shop, job)
    Worker(shop).run(once=True)
    check_succeeded(shop, job)
    assert len((shop.run_of(job).path / "starts").read_text().split()) == 1


@pytest.mark.parametrize("gone", ["whole", "half", "not at all"])
def test_a_checkpoint_replaced_while_it_is_copied_is_passed_over(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    copy = shutil.copytree

    def late(source: Path, *args: Any, **more: Any) -> Any:
        if source.name == "step-2" and gone == "whole":
            shutil.rmtree(source)
        elif source.name == "step-2" and gone == "half":
            (source / "adapter_model.safetensors").unlink()
        elif source.name == "step-2":
            raise PermissionError(errno.EACCES, "no copy is made")
        return copy(source, *args, **more)

    monkeypatch.setattr(shutil, "copytree", late)
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    if gone == "not at all":
        error = jobs.get(shop.database, project.id, job.id).error
        assert error is not None
        assert "no copy is made" in error["message"]
        return
    assert status_of(shop, job) == "succeeded"
    found = jobs.list_checkpoints(shop.database, project.id, job.id)
    assert [checkpoint.step_number for checkpoint, _ in found] == [6, 4]
    assert not any("is not published" in text for text in messages_of(shop, job))


def test_the_newest_checkpoints_stay(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(steps=12)
    usual = add_job(shop, project)
    chosen = add_job(shop, project, options={"keep_checkpoints": 1})
    Worker(shop).run(once=True)
    for job, steps in ((usual, [12, 10, 8]), (chosen, [12])):
        found = jobs.list_checkpoints(shop.database, project.id, job.id)
        assert [checkpoint.step_number for checkpoint, _ in found] == steps
        assert found[0][0].metrics == {"step": 12, "train_loss": 1 / 12}
        assert sum("Checkpoint created" in text for text in messages_of(shop, job)) == 6
    assert len(list(shop.settings.adapters_dir.iterdir())) == 2 + 6 + 6
    with shop.database.write() as session:
        for version in session.scalars(select(AdapterVersion)):
            if version.deleted_at is not None and version.job_id == usual.id:
                version.deleted_at -= adapter_folders.GRACE_S
    adapter_folders.sweep_job(shop.database, shop.settings.adapters_dir, usual.id)
    assert len(list(shop.settings.adapters_dir.iterdir())) == 2 + 3 + 6
    adapter_folders.sweep(shop.database, shop.settings.adapters_dir, min_age_s=0)
    assert len(list(shop.settings.adapters_dir.iterdir())) == 2 + 3 + 1


def test_a_job_goes_on_from_a_checkpoint(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    first = add_job(shop, project, suffix="base")
    Worker(shop).run(once=True)
    name = jobs.list_checkpoints(shop.database, project.id, first.id)[0][1].name
    second = add_job(shop, project, model=name, suffix="next")
    behave(fault="traceback")  # so that the folder is looked at before it is cleared
    Worker(shop).run(once=True)
    config = (shop.run_of(second).path / "config.yaml").read_text()
    assert "start_adapter" in config
    assert "base_model: smollm2-135m-instruct" in config
    behave()
    third = add_job(shop, project, model=name)
    registry.delete(shop.database, project.id, name)
    Worker(shop).run(once=True)
    gone = jobs.get(shop.database, project.id, third.id)
    assert gone.error is not None
    assert gone.error["code"] == "model_gone"


def test_the_configuration_says_all_that_was_asked(shop: Workshop, project: Project) -> None:
    asked = {
        "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj"]},
        "max_seq_length": 99,
        "n_checkpoints": 2,
        "on_long": "error",
    }
    numbers = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    job = add_job(shop, project, seed=5, hyperparameters=numbers, options=asked)
    Worker(shop).run(once=True)

    config = read_config(SftConfig, shop.run_of(job).path / "config.yaml")
    assert (config.num_epochs, config.batch_size, config.learning_rate_multiplier) == (2, 4, 0.5)
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (8, 16, ["q_proj"])
    assert (config.max_length, config.n_checkpoints, config.on_long) == (99, 2, "error")
    assert (config.seed, config.min_examples, config.base_model) == (5, 10, MODEL)
    assert config.train_file.name == "train.jsonl"


def test_no_rank_is_trained_that_could_not_be_served(shop: Workshop, project: Project) -> None:
    """However a job was made: an upgrade takes over the options of an older one."""
    values = shop.settings.model_copy(update={"max_lora_rows": 8})
    small = replace(shop, settings=values)
    asked = [add_job(shop, project, options={"lora": lora}) for lora in ({"r": 16}, {"alpha": 8})]
    Worker(small).run(once=True)
    large, auto = (jobs.get(shop.database, project.id, job.id) for job in asked)
    assert large.status == "failed"
    assert "16 is above the largest rank" in large.error["message"]  # type: ignore[index]
    assert auto.status == "succeeded"
    config = read_config(SftConfig, shop.run_of(auto).path / "config.yaml")
    assert (config.lora.r, config.max_auto_rank) == ("auto", 8)


def test_early_stopping_reaches_the_trainer(shop: Workshop, project: Project) -> None:
    rows = "\n".join(ROWS).encode() + b"\n"
    valid = shop.files.create(project.id, [rows], "valid.jsonl", "fine-tune").id
    asked = {"enabled": True, "patience": 3, "min_delta": 0.1, "warmup_evals": 2}
    options = {"early_stopping": asked, "n_evals": 9}
    job = add_job(shop, project, validation_file=valid, options=options)
    Worker(shop).run(once=True)
    config = read_config(SftConfig, shop.run_of(job).path / "config.yaml")
    assert config.early_stopping.model_dump() == asked
    assert (config.n_evals, config.score_examples) == (9, 5000)
    with pytest.raises(InvalidInput, match="at every evaluation"):
        add_job(shop, project, validation_file=valid, options={**options, "n_checkpoints": 3})


def test_the_plan_is_told_with_time_and_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = fake_worker.make_shop(tmp_path, prices={"training": 5.0})
    project = accounts.create_account(shop.database, "acme")[0]
    data = {"examples": 12, "tokens": 1000}
    monkeypatch.setenv("FAKE_TRAINER", json.dumps({"train_data": data, "tokens": 100}))
    jobs_done = []
    for _ in range(2):
        jobs_done.append(add_job(shop, project))
        Worker(shop).run(once=True)
    first, second = (jobs.get(shop.database, project.id, job.id) for job in jobs_done)
    assert first.tokens_per_s is not None
    assert 0 < first.tokens_per_s < 100 / 0.02
    told = [
        event.data
        for event in jobs.list_events(shop.database, project.id, second.id, limit=100)[0]
        if event.message == "Training on 12 examples, 3000 tokens in all"
    ]
    seconds = round(3000 / first.tokens_per_s, 1)
    plan = {"num_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}  # the trainer's
    cost = 3000 * 5.0 / 1e6
    assert told == [
        {"examples": 12, "tokens": 3000, "est_seconds": seconds, "est_cost": cost, "plan": plan}
    ]
    shop.database.close()
