"""A test double of a trainer: a process that writes the files of a run folder, and misbehaves.

    python tests/fake_trainer.py --config FILE

What it does is told by the JSON in the environment variable FAKE_TRAINER: `steps`, `step_s`,
`checkpoint_every`, the result's `gate`, and a `fault` with the step `at` which it happens.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from train.run import RunFolder, step_of, write_json

FINGERPRINT = "base-fake"
DEFAULTS = {"steps": 6, "step_s": 0.02, "checkpoint_every": 2, "fault": None, "at": 3}


def write_adapter(folder: Path, rank: int = 4, fingerprint: str = FINGERPRINT) -> None:
    """Write a small PEFT folder."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": rng.normal(size=(rank, 8)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.normal(size=(8, rank)).astype(np.float32),
    }
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    origin = {"base_model": "tiny", "base_fingerprint": fingerprint}
    (folder / "hone.json").write_text(json.dumps(origin))


def main() -> int:
    plan = DEFAULTS | json.loads(os.environ.get("FAKE_TRAINER", "{}"))
    config = yaml.safe_load(Path(sys.argv[2]).read_text("utf-8"))
    run = RunFolder(Path(config["output_dir"]))
    lock = (run.path / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (run.path / "two-trainers-at-once").touch()
        raise
    if plan["fault"] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif plan["fault"] == "slow_stop":
        signal.signal(signal.SIGTERM, lambda *_: stop_slowly(run))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (run.path / "starts").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    run.prepare()
    return train(run, plan, config)


def stop_slowly(run: RunFolder) -> None:
    """Do what takes a trainer a while when it is told to stop: write a checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)
    (run.path / "stopped-in-order").touch()
    sys.exit(143)


def train(run: RunFolder, plan: dict[str, Any], config: dict[str, Any]) -> int:
    newest = run.newest_checkpoint()
    first = step_of(newest) if newest else 0
    run.trim_logs(first if newest else -1)
    numbers = {"num_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
    write_json(run.resolved, {"plan": numbers, "train_data": plan.get("train_data")})
    run.tell("2 examples truncated to 16 tokens: lines 4, 9", level="warn")
    for step in range(first + 1, plan["steps"] + 1):
        time.sleep(plan["step_s"])
        loss = {"train_loss": 1 / step, "train_mean_token_accuracy": 0.5}
        if "tokens" in plan:
            loss["trained_tokens"] = step * plan["tokens"]
        run.append(run.metrics, {"step": step, "total_steps": plan["steps"], **loss})
        if step % plan["checkpoint_every"] == 0:
            (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
            write_adapter(run.model_of(step), fingerprint=FINGERPRINT)
            run.mark_complete(step)
            metrics = {"step": step, "train_loss": 1 / step}
            message = f"Checkpoint created at step {step}"
            run.tell(message, step=step, checkpoint=step, metrics=metrics)
        if step == plan["at"]:
            misbehave(run, plan, first)
    write_adapter(run.adapter, fingerprint="base-other" if plan["fault"] == "base" else FINGERPRINT)
    if plan["fault"] != "no_result":
        result = {"status": "succeeded", "trained_tokens": 123, "seed": config["seed"]}
        write_json(run.result, result | ({"gate": plan["gate"]} if "gate" in plan else {}))
    return 0


def misbehave(run: RunFolder, plan: dict[str, Any], first: int) -> None:
    fault = plan["fault"]
    if fault == "killed_once" and first == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped_once" and first == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "told":
        write_json(run.error, {"code": "loss_not_finite", "message": "The loss is nan at step 3"})
        sys.exit(1)
    if fault == "traceback":
        raise ZeroDivisionError("something odd")
    if fault == "disk":  # all but what is needed to say so
        (run.checkpoints / "checkpoint-99").mkdir(parents=True)
        with (run.checkpoints / "checkpoint-99" / "weights").open("wb", buffering=0) as stream:
            for _ in range(plan.get("blocks", 1)):
                stream.write(bytes(1 << 16))
        raise OSError(28, "No space left on device")


if __name__ == "__main__":
    sys.exit(main())
