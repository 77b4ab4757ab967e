"""TRL 1.12's experimental PPOTrainer, or RLOOTrainer, on random prompts; prints one JSON object.

Runs in an environment of its own (`benchmarks/ppo.py` makes it). More prompts than episodes: on
the last batch of a pass the trainer would take extra optimizer steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("batch", "prompt", "response", "updates", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--value", choices=["full", "lora"], default="full")
    parser.add_argument("--trainer", choices=["ppo", "rloo"], default="ppo")
    parser.add_argument("--model", required=True, help="folder of the base")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(ppo(given, folder) if given.trainer == "ppo" else rloo(given, folder)))


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR, task_type=task)


def load(given: argparse.Namespace) -> tuple[Any, Any, Dataset]:
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"  # not EOS: this trainer infers masks from ids
    policy = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    draw = torch.Generator().manual_seed(0)
    count = given.batch * (given.updates + 2)
    rows = torch.randint(10, 49152, (count, given.prompt), generator=draw).tolist()
    return tokenizer, policy, Dataset.from_dict({"input_ids": rows})


def scorer(given: argparse.Namespace, pad: int) -> Any:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        given.model, num_labels=1, dtype=getattr(torch, given.dtype)
    )
    model.config.pad_token_id = pad
    return model


def ppo(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, policy, data = load(given)
    reward, value = (scorer(given, tokenizer.pad_token_id) for _ in range(2))
    if given.value == "lora":  # kinder than its documentation, which trains all of it
        value = get_peft_model(value, lora("SEQ_CLS"))
    micro = max(1, given.batch // 4)
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=3e-5,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=given.batch // micro,
            num_mini_batches=1,
            num_ppo_epochs=4,
            total_episodes=given.batch * given.updates,
            local_rollout_forward_batch_size=given.batch,
            response_length=given.response,
            temperature=0.7,
            stop_token=None,
            kl_coef=0.05,
            num_sample_generations=0,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[clock],
    )
    loaded, started = peak(), time.process_time()
    trainer.train()
    cpu = (time.process_time() - started) / given.updates
    steps = {int(state["step"]) for state in trainer.optimizer.optimizer.state.values()}
    return report(clock, loaded, cpu) | {"optimizer_steps": max(steps)}


def rloo(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    from trl import RLOOConfig, RLOOTrainer

    tokenizer, policy, data = load(given)
    reward = scorer(given, tokenizer.pad_token_id)
    texts = [tokenizer.decode(row["input_ids"]) for row in data]
    policy.generation_config.eos_token_id = None  # every response has full length
    clock = Clock()
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=[reward],
        args=RLOOConfig(
            output_dir=folder,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=3e-5,
            per_device_train_batch_size=given.batch // 4,
            gradient_accumulation_steps=4,
            num_generations=4,
            num_iterations=4,
            max_completion_length=given.response,
            max_steps=4 * given.updates,
            temperature=0.7,
            beta=0.05,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_processing_classes=[tokenizer],
        peft_config=lora("CAUSAL_LM"),
        callbacks=[clock],
    )
    loaded, started = peak(), time.process_time()
    trainer.train()
    cpu = (time.process_time() - started) / given.updates
    clock.times = clock.times[::4]  # an update has four passes
    return report(clock, loaded, cpu) | {"optimizer_steps": 4 * given.updates}


def report(clock: Clock, loaded: int, cpu: float) -> dict[str, Any]:
    pairs = zip(clock.times[:-1], clock.times[1:], strict=True)
    seconds = [after - before for before, after in pairs]
    steady = statistics.median(seconds[1:] or seconds)
    return {
        "seconds_per_update": steady,
        "cpu_seconds_per_update": round(cpu, 2),
        "peak_bytes": peak(),
        "loaded_bytes": loaded,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
