"""The command line, run as a person would: a process, its output and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import people
from data.db import Database
from data.settings import Settings


@pytest.fixture
def hone(tmp_path: Path):
    def run(*words: str, status: int = 0) -> str:
        environment = {**os.environ, "HONE_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-m", "serve.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_account_is_made_listed_and_its_key_revoked(hone) -> None:
    made = json.loads(hone("accounts", "create", "Acme", "--json"))
    assert made["project_id"].startswith("proj_")
    assert made["api_key"].startswith("sk-")
    assert json.loads(hone("accounts", "list", "--json"))[0]["id"] == made["project_id"]
    (key,) = json.loads(hone("keys", "list", "--json"))
    assert made["api_key"] not in json.dumps(key)
    hone("keys", "revoke", key["id"])
    assert json.loads(hone("keys", "list", "--json"))[0]["revoked_at"]
    assert json.loads(hone("admin-keys", "create", "--json"))["api_key"].startswith("sk-")


def test_a_password_comes_from_the_environment(
    hone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hone("accounts", "create", "acme")
    monkeypatch.setenv("HONE_PASSWORD", "correct horse battery")
    added = json.loads(hone("people", "add", "ann@example.org", "--role", "admin", "--json"))
    assert added["password"] is None
    database = Database(Settings(home=tmp_path / "home").effective_database_url)
    assert people.sign_in(database, "ann@example.org", "correct horse battery")


def test_usage_is_told_of_each_account(hone, tmp_path: Path) -> None:
    made = json.loads(hone("accounts", "create", "acme", "--json"))
    assert hone("usage").strip() == "none"
    assert json.loads(hone("usage", "-a", "acme", "--days", "3", "--json"))["costs"]
    assert "choose of" in hone("usage", "--by", "shoe", status=2)
    assert made["project_id"]


def test_a_dataset_is_checked_stored_and_queued(hone, dataset: Path) -> None:
    hone("accounts", "create", "acme")
    assert "12" in hone("files", "validate", str(dataset))
    stored = json.loads(hone("files", "upload", str(dataset), "--json"))
    assert json.loads(hone("files", "report", stored["id"], "--json"))["num_examples"] == 12
    job = json.loads(hone("jobs", "create", stored["id"], "--epochs", "2", "--json"))
    assert job["status"] == "validating_files"
    assert job["hyperparameters"]["n_epochs"] == 2
    assert "Created fine-tuning job" in hone("jobs", "logs", job["id"])
    assert "cancelled" in hone("jobs", "cancel", job["id"])
    assert json.loads(hone("jobs", "show", job["id"]))["status"] == "cancelled"
    assert hone("models", "list").strip() == "none"


def test_a_bad_line_is_named(hone, dataset: Path) -> None:
    dataset.write_text(dataset.read_text() + "{broken\n")
    told = hone("files", "validate", str(dataset), status=1)
    assert f"{dataset}:13:" in told
    assert "invalid_json" in told


def test_a_table_becomes_a_dataset(hone, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("prompt,completion\n" + "".join(f"q{i},a{i}\n" for i in range(15)))
    told = hone("files", "prepare", str(table), "--output", str(tmp_path / "out.jsonl"))
    assert "wrote" in told
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 15


def test_errors_are_one_line_and_a_status(hone) -> None:
    assert "hone accounts create" in hone("files", "list", status=2)
    assert 'No account "nobody"' in hone("files", "list", "--account", "nobody", status=2)
    hone("accounts", "create", "acme")
    assert "No such File object" in hone("files", "report", "file-missing", status=2)
    assert "No such FineTuningJob" in hone("jobs", "cancel", "ftjob-missing", status=2)
    assert "did you mean" in hone("serve", "prt=3", status=2)
    assert "Traceback" not in hone("jobs", "create", "missing.jsonl", status=2)


def test_doctor_finds_this_machine_well(hone) -> None:
    findings = json.loads(hone("doctor", "--json"))
    assert {finding["check"] for finding in findings} >= {"python", "torch", "disk", "database"}


def test_feedback_is_imported_reported_and_exported(hone, tmp_path: Path) -> None:
    hone("accounts", "create", "acme")
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = json.loads(hone("feedback", "import", str(path), "--overlap", "2", "--json"))
    assert made["added"] == 3
    assert "0 of 3 tasks done" in hone("feedback", "report", made["label_project"])
    (listed,) = json.loads(hone("feedback", "list", "--json"))
    assert (listed["kind"], listed["wanted"]) == ("pairwise", 6)
    told = hone("feedback", "export", made["label_project"], status=2)
    assert "nothing to export as preference" in told
    assert "users has nothing" in hone("feedback", "export", "users", status=2)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "candidates": ["a"]}\n')
    told = hone("feedback", "import", str(tmp_path / "bad.jsonl"), "--kind", "pairwise", status=2)
    assert "2 candidates" in told
