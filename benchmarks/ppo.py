"""PPO against TRL's: the same prompts, responses of one length, passes and LoRA, in turn, one run.

TRL 1.12 is the last release with a PPOTrainer; it gets an environment of its own below .cache/peers
on the first run. Its value model is trained whole, as its example does (`full`), or by LoRA, which
is kinder (`lora`). TRL's RLOOTrainer has no value model. All float32.

    python benchmarks/ppo.py --json
    python benchmarks/ppo.py --response 128 --updates 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = {
    "trl_ppo_full": ["--trainer", "ppo", "--value", "full"],
    "trl_ppo_lora": ["--trainer", "ppo", "--value", "lora"],
    "trl_rloo": ["--trainer", "rloo"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="responses an update")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=32, help="tokens of a response")
    parser.add_argument("--updates", type=int, default=4, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    given = parser.parse_args()
    work = {n: getattr(given, n) for n in ("batch", "prompt", "response", "updates", "threads")}
    words = [f"--{name}={value}" for name, value in work.items()]
    models = given.models_dir.resolve()
    base = fetch(models)
    ours = {
        trunk: run(
            sys.executable, HERE / "peers/ppo_ours.py", words, f"--trunk={trunk}", models_dir=models
        )
        for trunk in ("separate", "shared")
    }
    peers = {}
    for name in given.peers:
        command = [*words, *PEERS[name], f"--model={base}"]
        peers[name] = run(peer_python(), HERE / "peers/ppo_trl.py", command)
    ratios = {
        f"{what}_{trunk}_vs_{name}": round(ours[trunk][key] / peer[key], 3)
        for trunk in ours
        for name, peer in peers.items()
        for what, key in (("seconds", "seconds_per_update"), ("peak_bytes", "peak_bytes"))
    }
    result = {
        "work": work | {"epochs": 4, "model": "smollm2-135m-instruct", "dtype": "float32"},
        "ours": ours,
        "peers": peers,
        "ratios": ratios,
        "machine": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
    }
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


def run(
    python: str | Path, script: Path, words: list[str], *more: str, models_dir: Path | None = None
) -> dict[str, Any]:
    """Run one contender alone; returns what it printed last."""
    command = [str(python), str(script), *words, *more]
    if models_dir is not None:
        command.append(f"--models-dir={models_dir}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    print(f"{script.name} {' '.join(more)} done", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def fetch(models_dir: Path) -> Path:
    """Return the folder of the base."""
    from serve.engine import base_model

    return base_model.fetch(base_model.find_spec("smollm2-135m-instruct"), models_dir)


def peer_python() -> Path:
    """Make TRL 1.12's environment beside hone's versions of everything else."""
    folder = ROOT / ".cache/peers/trl112"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        libraries = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "rich")
        subprocess.run([*install, *libraries], check=True)
        subprocess.run([*install[:5], "--no-deps", "trl==1.12.0"], check=True)
        (folder / "ready").touch()
    return python


def cpu_name() -> str:
    """Return what the kernel calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
