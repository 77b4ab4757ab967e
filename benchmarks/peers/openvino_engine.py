"""OpenVINO GenAI on the work of `benchmarks/serving.py`, in an environment of its own.

It cannot mix adapters in a batch, so its rows are the base and one adapter for all.

    python benchmarks/peers/openvino_engine.py --work FOLDER --json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

PACKAGES = ("torch==2.13.0", "openvino-genai==2026.4.1", "optimum-intel")
CLASHING = ("torchvision",)  # comes along, does not fit the CPU build of torch, is not needed
OUTPUT_TOKENS = 64
PROMPT_TOKENS = 75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with base/, adapter-0/")
    parser.add_argument("--env", type=Path, default=Path(".cache/peers/openvino"))
    parser.add_argument("--precision", default="f32", choices=("f32", "bf16"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.work, arguments.precision)))
        return
    python = prepare(arguments.env.resolve(), arguments.work)
    command = [python, __file__, "--inside", "--work", arguments.work]
    done = subprocess.run(
        [*map(str, command), "--precision", arguments.precision],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result, indent=None if arguments.json else 2))


def prepare(env: Path, work: Path) -> Path:
    """Make the environment and export the base, unless both are there."""
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, PACKAGES[0]], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)  # with torch again: it must stay as it is
        subprocess.run([*pip[:3], "uninstall", "-q", "-y", *CLASHING], check=True)
    if not (work / "openvino").exists():
        export = [env / "bin" / "optimum-cli", "export", "openvino", "--model", work / "base"]
        task = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        subprocess.run([*export, *task, work / "openvino"], check=True, stdout=sys.stderr)
    return python


def measure(work: Path, precision: str) -> dict[str, Any]:
    import openvino_genai as genai

    adapter = genai.Adapter(str(work / "adapter-0" / "adapter_model.safetensors"))
    results: dict[str, Any] = {}
    for name, adapters in (("base", None), ("one_adapter", genai.AdapterConfig(adapter))):
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = 16
        scheduler.enable_prefix_caching = False
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
        if adapters is not None:
            options["adapters"] = adapters
        pipe = genai.ContinuousBatchingPipeline(
            str(work / "openvino"), scheduler, "CPU", options, {}
        )
        run(pipe, 16, 1)
        results[f"{name}_16"] = run(pipe, 48, 16)
        results[f"{name}_1"] = run(pipe, 3, 1)
    return {"peer": "openvino-genai", "precision": precision, "tokens_per_s": results}


def run(pipe: Any, num_requests: int, at_once: int) -> float:
    """Return output tokens a second of so many requests, `at_once` handed over together."""
    import numpy
    import openvino
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens = OUTPUT_TOKENS
    config.ignore_eos = True
    config.do_sample = False
    draw = random.Random(0)
    prompts = [
        openvino.Tensor(numpy.array([[draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]]))
        for _ in range(num_requests)
    ]
    started = time.monotonic()
    if at_once > 1:  # continuous batching refills the batch by itself
        answers = pipe.generate(prompts, [config] * num_requests)
    else:
        answers = [a for prompt in prompts for a in pipe.generate([prompt], [config])]
    seconds = time.monotonic() - started
    produced = sum(len(answer.m_generation_ids[0]) for answer in answers)
    if produced != num_requests * OUTPUT_TOKENS:
        raise SystemExit(f"openvino produced {produced} tokens")
    return round(produced / seconds, 1)


if __name__ == "__main__":
    main()
