"""The operator's tools: a doctor that changes nothing, jobs that wait, adapters from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from sqlalchemy import text
from tiny_models import random_adapter, save_tiny_base, tiny_model

from data import accounts, jobs, presence
from data.db import Database
from data.files import FileStore
from data.job_spec import JobSpec
from data.settings import Settings
from data.tables import Job, Project

MODEL = "tiny-base"
ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n" for i in range(12)
)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / MODEL, "llama")


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> Settings:
    return Settings(home=tmp_path / "home", model=str(base))


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    told = {"HONE_HOME": str(settings.home), "HONE_MODEL": settings.model}
    return {**os.environ, **told, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def hone(environment: dict[str, str]) -> Run:
    def run(*words: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "serve.cli", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    found = Database(settings.effective_database_url)
    found.migrate()
    yield found
    found.close()


def add_job(settings: Settings, database: Database) -> tuple[Project, Job]:
    project, _ = accounts.create_account(database, "acme")
    store = FileStore(database, settings.effective_blob_url, 1 << 20, settings.limits)
    file = store.create(project.id, [ROWS], "rows.jsonl", "fine-tune")
    return project, jobs.create(database, project.id, JobSpec(MODEL, file.id), [MODEL])


def findings(hone: Run, status: int = 0) -> dict[str, dict[str, Any]]:
    told = hone("doctor", "--json", status=status)
    return {one["check"]: one for one in json.loads(told)}


def everything(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder; SQLite's shared memory is nobody's data."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }


# ---- the doctor ----


def test_a_look_makes_nothing(hone: Run, settings: Settings) -> None:
    found = findings(hone)
    assert all(one["ok"] for one in found.values())
    assert "the first start makes it" in found["database"]["detail"]
    assert found["migrations"]["detail"].startswith("none yet")
    assert found["worker"]["detail"].startswith("none runs")
    assert not settings.home.exists()


@pytest.mark.parametrize("is_open", [False, True])
def test_a_look_changes_nothing(
    hone: Run, settings: Settings, database: Database, is_open: bool
) -> None:
    """Beside a server that has written what is not yet in the main file, and when none runs."""
    add_job(settings, database)
    if not is_open:
        database.close()
    before = everything(settings.home)
    assert any(name.endswith("-wal") for name in before) == is_open
    found = findings(hone, status=1)
    assert found["migrations"]["ok"] is True
    assert found["migrations"]["detail"].startswith("current (")
    assert found["worker"]["ok"] is False
    assert "1 jobs wait" in found["worker"]["detail"]
    assert everything(settings.home) == before


@pytest.mark.parametrize(
    ("revision", "said"),
    [("0009_batches", "at 0009_batches; the next start"), ("9999_later", "of a newer hone")],
)
def test_a_schema_of_another_version_is_told(
    hone: Run, database: Database, revision: str, said: str
) -> None:
    with database.write() as session:
        session.execute(text("update alembic_version set version_num = :v"), {"v": revision})
    found = findings(hone, status=1)["migrations"]
    assert found["ok"] is False
    assert said in found["detail"]
    with database.read() as session:
        assert session.execute(text("select version_num from alembic_version")).scalar() == revision


def test_a_file_that_is_no_database_is_told(hone: Run, settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "hone.db").write_bytes(b"no database at all" * 100)
    found = findings(hone, status=1)
    assert found["database"]["ok"] is False
    assert "cannot be read" in found["database"]["detail"]


def test_a_worker_is_found_alive_and_dead(
    hone: Run, settings: Settings, environment: dict[str, str], database: Database
) -> None:
    command = [sys.executable, "-m", "train.worker"]
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (found := presence.alive(settings.workers_dir)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [one.pid for one in found] == [worker.pid]
        told = findings(hone)["worker"]
        assert told["ok"] is True
        assert f"process {worker.pid} since" in told["detail"]
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    finally:
        worker.kill()
        worker.wait()
    assert presence.alive(settings.workers_dir) == []
    assert len(list(settings.workers_dir.iterdir())) == 1  # what the dead one left
    with presence.announced(settings.workers_dir, "host:1:next"):
        assert [one.id for one in presence.alive(settings.workers_dir)] == ["host:1:next"]
        assert len(list(settings.workers_dir.iterdir())) == 1
    assert list(settings.workers_dir.iterdir()) == []


# ---- jobs ----


def test_a_job_is_paused_and_goes_on(hone: Run, settings: Settings, database: Database) -> None:
    project, job = add_job(settings, database)

    def status() -> str:
        return jobs.get(database, project.id, job.id).status

    assert hone("jobs", "pause", job.id).strip() == f"{job.id} is paused"
    assert status() == "paused"
    assert "is paused, so it cannot be paused" in hone("jobs", "pause", job.id, status=1)
    assert hone("jobs", "resume", job.id).strip() == f"{job.id} is queued"
    assert status() == "queued"
    assert "only a paused job can" in hone("jobs", "resume", job.id, status=1)
    assert "No such FineTuningJob" in hone("jobs", "pause", "ftjob-none", status=2)
    hone("accounts", "create", "other")
    assert "No such" in hone("jobs", "pause", job.id, "-a", "other", status=2)


# ---- adapters from elsewhere ----


def test_an_adapter_from_elsewhere(hone: Run, database: Database, tmp_path: Path) -> None:
    accounts.create_account(database, "acme")
    folder = random_adapter(tiny_model("llama"), tmp_path / "trained")
    name = hone("models", "import", str(folder), "--suffix", "mine").strip()
    assert name.startswith(f"ft:{MODEL}:acme:mine:")
    [listed] = json.loads(hone("models", "list", "--json"))
    assert (listed["name"], listed["promoted"]) == (name, True)
    hone("models", "export", name, str(tmp_path / "exported"))
    given, kept = (
        load_file(where / "adapter_model.safetensors") for where in (folder, tmp_path / "exported")
    )
    assert given.keys() == kept.keys()
    assert all((given[key] == kept[key]).all() for key in given)
    assert not (folder / "hone.json").exists()  # what was given is left as it was


def test_what_fits_no_module_of_the_base(hone: Run, database: Database, tmp_path: Path) -> None:
    accounts.create_account(database, "acme")
    folder = random_adapter(tiny_model("llama"), tmp_path / "whole")
    told = hone("models", "import", str(folder), "--suffix", "a:b", status=2)
    assert "Invalid 'suffix'" in told
    (folder / "hone.json").write_text('{"base_model": "x", "base_fingerprint": "another"}')
    assert "another" in hone("models", "import", str(folder), status=1)
    alien = random_adapter(tiny_model("gpt2"), tmp_path / "alien")
    assert "belongs to another base" in hone("models", "import", str(alien), status=2)
    (alien / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in hone("models", "import", str(alien), status=2)
    assert hone("models", "list").strip() == "none"
