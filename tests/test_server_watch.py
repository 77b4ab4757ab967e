"""What whoever watches a server relies on: /health tells of a failed engine, /metrics is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from prometheus_client.parser import text_string_to_metric_families

from data import accounts, jobs
from data.job_spec import JobSpec

DOCS = Path(__file__).parents[1] / "docs/operating.md"
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 12


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tiny_settings(tmp_path)) as found:
        yield found


def health(server: Server) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=60)


def ask(server: Server, **fields: Any) -> Any:
    options: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 3, **fields}
    return server.client().completions.create(**options)


# ---- /health ----


def test_a_step_that_fails_shows_and_its_end_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has just answered; then its steps fail; then they work again."""
    ask(server)
    assert health(server).status_code == 200

    def fail(_works: Any) -> Any:
        raise RuntimeError("no such device")

    with monkeypatch.context() as broken:
        broken.setattr(server.runtime.engine._runner, "run", fail)  # type: ignore[attr-defined]
        with pytest.raises(openai.InternalServerError):
            ask(server)
        answer = health(server)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("model_unavailable", "server_error")
        assert "does not answer" in error["message"]
        assert "no such device" not in error["message"]  # anybody may ask
    assert health(server).status_code == 200
    assert ask(server).choices


def test_an_engine_that_ended_shows(server: Server) -> None:
    server.runtime.engine.close()
    server.runtime.generator.last_answer_s = float("-inf")  # its last answer is long ago
    assert health(server).status_code == 503


def test_a_full_queue_is_no_failure(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, max_batch=1, queue_size=1)
    with running(settings) as server:
        extra = {"ignore_eos": True}
        with ask(server, max_tokens=480, n=100, stream=True, extra_body=extra) as stream:
            next(iter(stream))
            with pytest.raises(openai.APIStatusError) as caught:
                ask(server)
            assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
            server.runtime.generator.last_answer_s = float("-inf")
            assert health(server).status_code == 200


# ---- /metrics ----


def families(server: Server, key: str) -> dict[str, Any]:
    answer = server.http(key).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def samples(family: Any, name: str) -> dict[tuple[str, ...], float]:
    return {tuple(s.labels.values()): s.value for s in family.samples if s.name == name}


def test_metrics_are_prometheus_and_as_documented(server: Server) -> None:
    _, key = accounts.create_admin_key(server.runtime.database)
    usage = [ask(server).usage for _ in range(3)]
    assert server.http().get("/v1/files/absent").status_code == 404
    file = server.client().files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    jobs.create(server.runtime.database, server.project.id, JobSpec(MODEL, file.id), [MODEL])
    families(server, key)
    found = families(server, key)  # the first reading is counted in the second
    requests = samples(found["hone_requests"], "hone_requests_total")
    expected = {
        ("/v1/completions", "200"): 3,
        ("/v1/files/{file_id}", "404"): 1,
        ("/v1/files", "200"): 1,
        ("/metrics", "200"): 1,
    }
    assert requests == expected
    seconds = found["hone_request_seconds"]
    assert samples(seconds, "hone_request_seconds_count")["/v1/completions",] == 3
    assert samples(seconds, "hone_request_seconds_sum")["/v1/completions",] > 0
    assert samples(found["hone_jobs"], "hone_jobs") == {("validating_files",): 1}
    engine = samples(found["hone_engine"], "hone_engine")
    assert engine["generated_tokens_total",] >= sum(one.completion_tokens for one in usage)
    assert engine["requests_running",] == 0
    check_names(found, {stat for (stat,) in engine})


def check_names(found: dict[str, Any], stats: set[str]) -> None:
    """The documentation names what there is, and nothing else."""
    text = DOCS.read_text("utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"stat"}
    metrics = {name for name in named if name.startswith("hone_")}
    suffix = {"counter": "_total"}
    there = {f"{family.name}{suffix.get(family.type, '')}" for family in found.values()}
    there = {name for name in there if not name.endswith("_created")}  # when each counter began
    assert metrics == there
    assert named - metrics == stats
