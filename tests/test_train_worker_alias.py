"""Which alias a job's model takes, and which it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fake_trainer
import pytest
from test_train_worker import (
    MODEL,
    ROWS,
    add_job,
    behave,
    checkpoint_told,
    messages_of,
    project,
    shop,
    status_of,
    wait_for,
    worker_thread,
)

from data import jobs, registry
from data.tables import Job, Project
from train.worker import Worker
from train.workshop import Workshop

__all__ = ["behave", "project", "shop"]  # fixtures


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_model_replaces_only_the_one_that_it_was_compared_with(
    shop: Workshop, project: Project, behave: Callable[..., None], tmp_path: Path, overtaken: bool
) -> None:
    behave(step_s=0.2, gate={"promote": True, "reasons": ["better"]})
    rows = shop.files.create(
        project.id, [b"\n".join(map(str.encode, ROWS))], "v.jsonl", "fine-tune"
    )
    job = add_job(shop, project, suffix="s", validation_file=rows.id)
    alias = f"ft:{MODEL}:acme:s"
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 2))
        if overtaken:
            fake_trainer.write_adapter(tmp_path / "other", rank=5)
            other = registry.publish(
                *(shop.database, shop.settings.adapters_dir, project, tmp_path / "other"),
                *(MODEL, fake_trainer.FINGERPRINT),
                suffix="s",
            )
        wait_for(lambda: status_of(shop, job) in jobs.FINAL)
    made = jobs.get(shop.database, project.id, job.id)
    assert made.status == "succeeded"
    named = registry.resolve(shop.database, project.id, alias).name
    told = [message for message in messages_of(shop, job) if "romoted" in message]
    if overtaken:
        assert named == other.name
        assert "came into use meanwhile" in told[0]
    else:
        assert named == made.fine_tuned_model
        assert told == ["Promoted: better"]


@pytest.mark.parametrize("first", ["supervised", "reward_model"])
def test_an_alias_names_models_that_answer_or_reward_models(
    shop: Workshop, project: Project, first: str
) -> None:
    second = "supervised" if first == "reward_model" else "reward_model"
    pairs = [
        json.dumps({"prompt": f"question {i}", "chosen": "a", "rejected": "b"}) for i in range(12)
    ]
    made: list[Job] = []
    for kind in (first, second, second):
        rows = pairs if kind == "reward_model" else ROWS
        suffix = "judge" if len(made) == 2 else None
        made.append(add_job(shop, project, rows, method={"type": kind}, suffix=suffix))
        Worker(shop).run(once=True)
    models = [jobs.get(shop.database, project.id, job.id).fine_tuned_model for job in made]
    for alias, model in (("default", models[0]), ("judge", models[2])):
        named = registry.resolve(shop.database, project.id, f"ft:{MODEL}:acme:{alias}")
        assert named.name == model
    (told,) = [m for m in messages_of(shop, made[1]) if "romoted" in m]
    kinds = {"supervised": "a model that answers", "reward_model": "a reward model"}
    assert f"names {models[0]}, {kinds[first]}, and the new one is {kinds[second]}" in told
    assert "a suffix of their own" in told
