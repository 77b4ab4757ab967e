"""A round with everything real on a tiny base: server, worker, trainers, labelers. Slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, tiny_settings
from working_server import working

pytestmark = pytest.mark.slow

FAST = {"learning_rate_multiplier": 100}  # so that a tiny model surely answers otherwise
HYPERPARAMETERS: dict[str, Any] = {
    "dpo": {"dpo": {"n_epochs": 4, "batch_size": 8, **FAST}},
    "ppo": {
        "reward_model": {"n_epochs": 2, "batch_size": 8},
        "ppo": {"n_epochs": 1, "batch_size": 8, **FAST},
    },
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with working(tiny_settings(tmp_path, threads=1)) as found:
        yield found


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def judge(http: httpx.Client, label_project: str, choose: Any) -> int:
    """Judge all that there is to judge."""
    count = 0
    while True:
        query = {"label_project_id": label_project}
        shown = http.get("/v1/comparisons/next", params=query).json()["comparison"]
        if shown is None:
            return count
        post(http, f"/v1/comparisons/{shown['id']}", choice=choose(shown))
        count += 1


def follow(http: httpx.Client, round_id: str, until: set[str], limit_s: float = 240) -> Any:
    deadline = time.monotonic() + limit_s
    while True:
        found = http.get(f"/v1/label_rounds/{round_id}").json()
        if found["status"] in until:
            return found
        assert found["status"] not in ("failed", "rejected", "cancelled"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_from_judgements_to_the_model_in_use(server: Server, method: str) -> None:
    http, client = server.http(), server.client()
    labeling = post(http, "/v1/label_projects", name="mail", kind="pairwise")["id"]
    pairs = [
        {"prompt": f"Say {i}.", "candidates": [f"fine {i}", f"bad bad bad {i}"]} for i in range(48)
    ]
    post(http, f"/v1/label_projects/{labeling}/tasks", tasks=pairs)

    def good(shown: Any) -> str:
        return next(o["key"] for o in shown["options"] if o["text"].startswith("fine"))

    assert judge(http, labeling, good) == len(pairs)
    started = post(
        http,
        "/v1/label_rounds",
        label_project_id=labeling,
        model=MODEL,
        method=method,
        suffix="mail",
        comparisons=12,
        rule={"min_judgements": 1, "min_win_rate": 0.6},
        hyperparameters=HYPERPARAMETERS[method],
    )
    found = follow(http, started["id"], {"comparing"})
    candidate = found["candidate"]
    assert candidate.split(":")[-2] == "mail"
    alias = candidate.rpartition(":")[0]
    assert alias not in {model.id for model in client.models.list()}

    def answer(model: str, prompt: str) -> str:
        return (
            client.completions.create(model=model, prompt=prompt, max_tokens=256, temperature=0)
            .choices[0]
            .text
        )

    def new(shown: Any) -> str:
        old = answer(MODEL, shown["prompt"])
        texts = {o["text"]: o["key"] for o in shown["options"]}
        assert texts.keys() == {old, answer(candidate, shown["prompt"])}
        return next(key for text, key in texts.items() if text != old)

    assert judge(http, found["comparison_id"], new) >= 1
    done = follow(http, started["id"], {"promoted"}, limit_s=30)
    assert done["decision"]["win_rate"] >= 0.6
    assert answer(alias, "Say 1.") == answer(candidate, "Say 1.")
