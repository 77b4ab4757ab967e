"""The main job on the real model, and on a tiny one while processes are killed.

Real processes throughout: `hone demo`, a server, its worker, `accelerate launch`, the official
client, PEFT. Slow: run by `make test-slow`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from openai import NotFoundError, OpenAI
from tiny_models import save_tiny_base

from data.accounts import create_account
from data.db import Database
from data.settings import load_settings
from serve.background import running_server

pytestmark = pytest.mark.slow
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Run the demo once; gives its home and what it printed."""
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-m", "serve.cli", "demo", "--json"],
        env={**os.environ, "HONE_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1500,
    )
    return home, json.loads(done.stdout)


def test_the_demo_makes_a_better_model(demo: tuple[Path, dict[str, object]]) -> None:
    _, result = demo
    accuracy = result["exact_match"]
    assert isinstance(accuracy, dict)
    base, tuned = accuracy.values()
    assert tuned >= base + 0.3
    assert result["hyperparameters"]["n_epochs"] > 0  # type: ignore[index]


def test_an_exported_version_answers_the_same_in_peft(
    demo: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, result = demo
    name = str(result["fine_tuned_model"])
    hone = [sys.executable, "-m", "serve.cli"]
    environment = {**os.environ, "HONE_HOME": str(home)}
    made = subprocess.run(
        [*hone, "keys", "create", "--account", "demo", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    key = json.loads(made.stdout)["api_key"]
    exported = tmp_path / "exported"
    subprocess.run([*hone, "models", "export", name, str(exported)], env=environment, check=True)
    prompt = "My parcel is late, where is it?\n\nIntent:"
    with running_server(home, ["dtype=float32"]) as base_url:
        client = OpenAI(base_url=base_url, api_key=key)
        answer = client.completions.create(
            model=name, prompt=prompt, max_tokens=12, temperature=0, logprobs=1
        )
    (folder,) = [path.parent for path in (home / "models").glob("*/config.json")]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, str(exported)).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].text == wanted


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a tiny base model, and a dataset beside it."""
    save_tiny_base(tmp_path / "tiny", "llama")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(400)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def words(home: Path) -> list[str]:
    return [f"model={home / 'tiny'}", "lease_s=4", "heartbeat_s=0.5"]


@pytest.fixture
def clients(home: Path, words: list[str]) -> Iterator[Callable[[str, str], OpenAI]]:
    """Make clients for accounts, by name: the account is made at the first use."""
    settings = load_settings(overrides=[f"home={home}", *words])
    database = Database(settings.effective_database_url)
    database.migrate()
    keys: dict[str, str] = {}

    def client(base_url: str, account: str) -> OpenAI:
        if account not in keys:
            keys[account] = create_account(database, account)[1]
        return OpenAI(base_url=base_url, api_key=keys[account], max_retries=0)

    yield client
    database.close()


@pytest.mark.parametrize("victim", ["trainer", "worker", "server"])
def test_a_job_survives_the_death_of_any_process(
    home: Path, words: list[str], clients: Callable[[str, str], OpenAI], victim: str
) -> None:
    model = "tiny"
    with running_server(home, words) as base_url:
        client = clients(base_url, "acme")
        with (home / "train.jsonl").open("rb") as stream:
            file = client.files.create(file=stream, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=model,
            training_file=file.id,
            seed=1,
            hyperparameters={"n_epochs": 15, "batch_size": 4},
        )
        wait_for(lambda: checkpoint_exists(home, job.id))
        if victim != "server":
            os.kill(find(victim, home), signal.SIGKILL)
            finish(client, job.id)
        else:
            os.kill(find("server", home), signal.SIGKILL)
    with running_server(home, words) as base_url:
        client = clients(base_url, "acme")
        done = finish(client, job.id)
        assert done.status == "succeeded", done.error
        answer = client.completions.create(
            model=str(done.fine_tuned_model), prompt="1 + 1 =", max_tokens=4, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1
        assert client.files.content(file.id).content == (home / "train.jsonl").read_bytes()
        steps = [
            event.data["step"]  # type: ignore[index]
            for event in client.fine_tuning.jobs.list_events(job.id, limit=100)
            if event.type == "metrics"
        ]
        assert len(steps) == len(set(steps))
        with pytest.raises(NotFoundError):
            clients(base_url, "other").models.retrieve(str(done.fine_tuned_model))
        versions = {model.root for model in client.models.list() if model.parent}  # type: ignore[attr-defined]
        kept = [name for name in versions if ":ckpt-step-" in name]
        assert versions - set(kept) == {done.fine_tuned_model}
        assert len(kept) == 3


def checkpoint_exists(home: Path, job_id: str) -> bool:
    return any((home / "runs" / job_id / "checkpoints").glob("checkpoint-*/complete*"))


def find(kind: str, home: Path) -> int:
    """Return the id of a process of this home's server, worker or trainer."""
    marks = {"server": "serve.cli", "worker": "train.worker", "trainer": "train.sft"}
    if kind == "worker":  # its settings are not on its command line
        children = psutil.Process(find("server", home)).children()
        return next(p.pid for p in children if marks[kind] in p.cmdline())
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or ())
        mine = str(home) in line or str(home) in str(process.info["environ"])
        launcher = "accelerate" in line or "trainer_process" in line
        if marks[kind] in line and mine and not launcher:
            return process.pid
    raise AssertionError(f"no {kind} runs")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def finish(client: OpenAI, job_id: str):
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.3)
