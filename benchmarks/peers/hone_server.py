"""hone's own server on the work of `benchmarks/serving.py`, as a process of its own.

python benchmarks/peers/hone_server.py --work FOLDER --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from http_load import OUTPUT_TOKENS, free_port, openai_tokens, prompts, rate, server

from data import accounts, registry
from data.adapter_checks import ORIGIN
from data.db import Database
from data.settings import Settings
from serve.engine import base_model

NUM_ADAPTERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with base/, adapter-0/")
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        result = measure(arguments.work.resolve(), Path(home))
    print(json.dumps(result, indent=None if arguments.json else 2))


def publish(work: Path, home: Path, base: str) -> tuple[str, list[str]]:
    """Register the adapters for a new account; returns its key and their names."""
    settings = Settings(home=home)
    database = Database(settings.effective_database_url)
    database.migrate()
    project, key = accounts.create_account(database, "bench")
    fingerprint = base_model.fingerprint((work / "base").resolve())
    names = []
    for number in range(NUM_ADAPTERS):
        folder = work / f"adapter-{number}"
        (folder / ORIGIN).write_text(json.dumps({"base_fingerprint": fingerprint}))
        version = registry.publish(
            database, settings.adapters_dir, project, folder, base, fingerprint
        )
        names.append(version.name)
    database.close()
    return key, names


def measure(work: Path, home: Path) -> dict[str, Any]:
    base = base_model.find_spec(str(work / "base")).name
    key, names = publish(work, home, base)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HONE_HOME": str(home), "HONE_PORT": str(port)}
    environment |= {"HONE_MODEL": str(work / "base"), "HONE_EMBEDDED_WORKER": "false"}
    hone = Path(sys.executable).parent / "hone"
    with server([hone, "serve"], f"{url}/health", work / "hone.log", environment) as ready_s:
        headers = {"authorization": f"Bearer {key}"}

        def run(models: list[str], clients: int) -> float:
            bodies = [
                {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                for model, prompt in zip(models, prompts(len(models)), strict=True)
            ]
            return rate(f"{url}/v1/completions", bodies, clients, openai_tokens, headers)

        run([*names, base], 9)
        results = {
            "base_16": run([base] * 48, 16),
            "one_adapter_16": run(names[:1] * 48, 16),
            "mixed_16": run(names * 6, 16),
            "base_1": run([base] * 3, 1),
            "one_adapter_1": run(names[:1] * 3, 1),
        }
    return {"peer": "hone", "ready_s": round(ready_s, 1), "tokens_per_s": results}


if __name__ == "__main__":
    main()
