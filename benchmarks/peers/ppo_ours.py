"""hone's PPO on random prompts of one length, for `benchmarks/ppo.py`; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from rlhf.ppo_config import PpoConfig
from rlhf.ppo_setup import set_up
from rlhf.ppo_trainer import PpoTrainer
from rlhf.prompts import Prompt
from rlhf.reward_model import Normalizer, save_head
from rlhf.watch import peak_bytes
from serve.engine import base_model
from train.callbacks import Stopper
from train.run import RunFolder

MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("batch", "prompt", "response", "updates", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--trunk", choices=["separate", "shared"], default="separate")
    parser.add_argument("--models-dir", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(given, Path(scratch))))


def measure(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    reward = folder / "reward"
    process = get_context("spawn").Process(target=make_reward, args=(reward, given.models_dir))
    process.start()  # of its own, so that its memory is not counted
    process.join()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p {i}"}) + "\n" for i in range(8)))
    config = PpoConfig.model_validate(
        {
            "base_model": MODEL,
            "models_dir": given.models_dir,
            "prompts_file": prompts,
            "output_dir": folder / "run",
            "eval_prompts": 0,
            "max_new_tokens": given.response,
            "max_prompt_length": given.prompt,
            "stop_at_eos": False,
            "temperature": 0.7,
            "batch_size": given.batch,
            "total_episodes": given.batch * given.updates,
            "num_epochs": 4,
            "save_every": 10_000,
            "dtype": given.dtype,
            "threads": given.threads,
            "reward": {"model": reward, "clip": None},
            "value": {"trunk": given.trunk, "warmup_updates": 0},
            "device": "cpu",
        }
    )
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(
        10, 49152, (given.batch * (given.updates + 2), given.prompt), generator=draw
    )
    import rlhf.ppo_setup

    made = [Prompt(i + 1, tuple(row), "") for i, row in enumerate(rows.tolist())]
    rlhf.ppo_setup.read_prompts = lambda *_: (made, [], [])  # the very ids, not their text
    job = set_up(config)
    loaded = peak_bytes()
    run = RunFolder(config.output_dir)
    run.prepare()
    trainer = PpoTrainer(job, run, Stopper())
    started = time.process_time()
    try:
        trainer.train(None)
    finally:
        job.close()
    cpu = (time.process_time() - started) / given.updates
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()][1:]
    names = ("time/step", "time/rollout", "time/score", "time/train")
    found = {name: statistics.median(record[name] for record in records) for name in names}
    return {
        "seconds_per_update": found["time/step"],
        "cpu_seconds_per_update": round(cpu, 2),
        "phases": {name.partition("/")[2]: value for name, value in found.items()},
        "peak_bytes": max(record["mem/peak"] for record in records),
        "loaded_bytes": loaded,
        "optimizer_steps": records[-1]["optimizer_steps"],
    }


def make_reward(folder: Path, models_dir: Path) -> None:
    """Save a reward model with a random head; what it says does not matter here."""
    spec = base_model.find_spec(MODEL)
    base = base_model.fetch(spec, models_dir)
    model, _ = base_model.load(base, "float32", "cpu")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(folder), save_embedding_layers=False)
    torch.manual_seed(1)
    save_head(folder, torch.randn(model.config.hidden_size) / 24, Normalizer(0.0, 1.0, 256))


if __name__ == "__main__":
    sys.exit(main())
