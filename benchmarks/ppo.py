"""PPO against TRL's: the same prompts, responses of one length, passes and LoRA, in turn, one run.

TRL 1.12 is the last release with a PPOTrainer; it is installed below .cache/peers on the first run
and uses hone's versions of everything else. Its value model is trained whole, as its example does
(`full`), or by LoRA, which is kinder (`lora`). TRL's RLOOTrainer (hone's version of TRL) has no
value model; an update of it has as many responses and passes, four responses to a prompt. Bases
are read in one dtype by all, adapters are float32.

    python benchmarks/ppo.py --json
    python benchmarks/ppo.py --response 128 --updates 3 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
WORK = ("batch", "prompt", "response", "updates", "threads", "dtype")
MEASURED = {
    "seconds": "seconds_per_update",
    "cpu_seconds": "cpu_seconds_per_update",  # of all threads: less moved by other programs
    "peak_bytes": "peak_bytes",
}
TRUNKS = ("separate", "shared")
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trunks", nargs="*", choices=TRUNKS, default=list(TRUNKS), help="ours")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    given = parser.parse_args()
    work = {n: getattr(given, n) for n in WORK}
    words = [f"--{name}={value}" for name, value in work.items()]
    models = given.models_dir.resolve()
    base = fetch(models)
    ours = {
        trunk: run(
            HERE / "peers/ppo_ours.py", [*words, f"--trunk={trunk}", f"--models-dir={models}"]
        )
        for trunk in given.trunks
    }
    peers = {}
    for name in given.peers:
        command = [*words, *PEERS[name], f"--model={base}"]
        path = [] if name == "trl_rloo" else [trl_with_ppo()]
        peers[name] = run(HERE / "peers/ppo_trl.py", command, path=path)
    ratios = {
        f"{what}_{trunk}_vs_{name}": round(ours[trunk][key] / peer[key], 3)
        for trunk in ours
        for name, peer in peers.items()
        for what, key in MEASURED.items()
    }
    result = {
        "work": work | {"epochs": 4, "model": "smollm2-135m-instruct"},
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


def run(script: Path, words: list[str], path: Sequence[Path] = ()) -> dict[str, Any]:
    """Run one contender alone; returns what it printed last."""
    command = [sys.executable, str(script), *words]
    search = os.pathsep.join(str(folder) for folder in (*path, ROOT))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{script.name} {' '.join(words)}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def fetch(models_dir: Path) -> Path:
    """Return the folder of the base."""
    from serve.engine import base_model

    return base_model.fetch(base_model.find_spec("smollm2-135m-instruct"), models_dir)


def trl_with_ppo() -> Path:
    """Return a folder to import TRL 1.12 from; all that it needs comes from hone's environment."""
    folder = ROOT / ".cache/peers/trl112"
    if not (folder / "trl-1.12.0.dist-info/RECORD").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
        subprocess.run([*install, "--target", str(folder), "trl==1.12.0"], check=True)
    return folder


def cpu_name() -> str:
    """Return what the kernel calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
