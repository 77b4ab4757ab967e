"""What hone makes of real human preferences: reward models on five sets, then DPO and PPO on one.

Each set is a folder of DATA with train.jsonl and test.jsonl of prompt, chosen and rejected (chat:
train.messages.jsonl ...). A reward model learns a set's training pairs and is judged on its test
pairs, whose prompts it has not seen, beside "the longer answer wins". On --policy-set, SFT learns
the chosen answers; DPO starts from it on the pairs, and PPO on the prompts with the reward model.
All answer the test prompts greedily, and that reward model says how often they beat SFT. A second
one, which learned the test pairs and no policy saw, says it too (`judge`).

Steps whose result is there are not done again, so the command goes on where it was stopped.

    python -m benchmarks.preferences DATA --out runs/preferences
    python -m benchmarks.preferences DATA --out runs/small --train-pairs 300 --test-pairs 200 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETS = ("nlg_ratings", "qa_feedback", "ukp_convincing", "hh_helpful", "hh_harmless")
POLICIES = ("dpo", "ppo")
NEW_TOKENS = 64
PPO_PROMPT_TOKENS = 224
JUDGE_PAIRS = 200  # training pairs that the judge, which learned the test pairs, is judged on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with a folder for each set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--policy-set", default="hh_helpful", help="none: no policies")
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--train-pairs", type=int, help="at most, drawn by seed 0; default: all")
    parser.add_argument("--test-pairs", type=int, help="at most; default: all")
    parser.add_argument("--policy-rows", type=int, help="that policies learn from; default: all")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument("--num-epochs", type=int, default=1, help="of a reward model")
    parser.add_argument("--ppo-updates", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=150, help="that policies are compared on")
    parser.add_argument("--processes", type=int, default=1, help="that share each training step")
    parser.add_argument("--threads", type=int, help="of each process; default: all cores")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"settings": describe(given), "machine": machine(), "sets": {}}
    for name in given.sets:
        write_set(given, name)
        told["sets"][name] = reward_model(given, name)
        print(f"{name}: {json.dumps(told['sets'][name])}", file=sys.stderr, flush=True)
    if given.policy_set != "none":
        told["policies"] = policies(given)
    (given.out / "result.json").write_text(json.dumps(told, indent=2))
    print(json.dumps(told) if given.json else tables(told))


def describe(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are no paths."""
    return {name: value for name, value in vars(given).items() if not isinstance(value, Path)}


def machine() -> dict[str, Any]:
    """Return what the figures were made on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def write_set(given: argparse.Namespace, name: str) -> None:
    """Write a set's rows as chats, at most as many as asked, into the folder of results."""
    for part, most in (("train", given.train_pairs), ("test", given.test_pairs)):
        target = given.out / f"{name}-{part}.jsonl"
        if target.exists():
            continue
        folder = given.data / name
        chats = folder / f"{part}.messages.jsonl"
        source = chats if chats.exists() else folder / f"{part}.jsonl"
        rows = [as_chat(json.loads(line)) for line in source.open(encoding="utf-8")]
        random.Random(0).shuffle(rows)
        write(target, rows[:most])


def as_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison whose prompt and answers are messages."""
    if "messages" in row:
        return {"prompt": row["messages"], "chosen": row["chosen"], "rejected": row["rejected"]}
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **sides}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.rename(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def train(
    given: argparse.Namespace, module: str, name: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Run a trainer, unless its result is there; a run that was cut off goes on."""
    folder = given.out / name
    if not (folder / "result.json").exists():
        settings = {"base_model": given.base_model, "models_dir": given.models_dir, **settings}
        if given.threads:
            settings = {**settings, "threads": given.threads}
        command = [sys.executable, "-m", module]
        if given.processes > 1:
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(ROOT / "configs/accelerate/two_cpu_processes.yaml")]
            command += ["--num_processes", str(given.processes)]
            command += ["--num_cpu_threads_per_process", str(given.threads or 1), "-m", module]
        words = [f"{key}={value}" for key, value in settings.items()]
        subprocess.run([*command, *words, f"output_dir={folder}"], check=True, env=environment())
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def environment() -> dict[str, str]:
    """Return the variables under which this repository's modules are found, and no network."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def reward_model(given: argparse.Namespace, name: str, swapped: bool = False) -> dict[str, Any]:
    """Train a set's reward model, or the judge that learns its test pairs; returns its card."""
    learned, held = (given.out / f"{name}-{part}.jsonl" for part in ("train", "test"))
    if swapped:
        checked = given.out / f"{name}-judge-test.jsonl"
        write(checked, read(learned)[:JUDGE_PAIRS])
        learned, held = held, checked
    folder = f"{'judge' if swapped else 'reward'}-{name}"
    settings = {
        "train_file": learned,
        "validation_file": held,
        "num_epochs": given.num_epochs,
        "batch_size": 16,
        "learning_rate": 2e-4,
        "max_length": given.max_length,
        "normalize_on": "validation",
        "n_evals": 1,
    }
    result = train(given, "rlhf.reward", folder, settings)
    card = json.loads((given.out / folder / "report_card.json").read_text("utf-8"))
    kept = ("accuracy", "accuracy_interval", "longer_wins", "pairs", "score_length_correlation")
    return {"train_pairs": result["train_pairs"], **{key: card[key] for key in kept}}


def policies(given: argparse.Namespace) -> dict[str, Any]:
    """Train SFT and what starts from it, and compare their answers to the test prompts."""
    name = given.policy_set
    pairs = given.out / f"{name}-policy.jsonl"
    rows = read(given.out / f"{name}-train.jsonl")[: given.policy_rows]
    write(pairs, rows)
    chats = [{"messages": [*row["prompt"], *row["chosen"]]} for row in rows]
    asked = [
        {"messages": [*row["prompt"], *row["chosen"]]}
        for row in read(given.out / f"{name}-test.jsonl")
    ][: given.prompts]
    write(given.out / f"{name}-sft.jsonl", chats)
    write(given.out / f"{name}-asked.jsonl", asked)
    sft = {
        "train_file": given.out / f"{name}-sft.jsonl",
        "num_epochs": 1,
        "learning_rate": 5e-4,
        "max_length": given.max_length,
    }
    train(given, "train.sft", f"sft-{name}", sft)
    start = given.out / f"sft-{name}/adapter"
    reward = given.out / f"reward-{name}/adapter"
    settings: dict[str, dict[str, Any]] = {
        "dpo": {
            "train_file": pairs,
            "validation_fraction": 0,
            "start_adapter": start,
            "max_length": given.max_length,
        },
        "ppo": {
            "prompts_file": pairs,
            "start_adapter": start,
            "reward.model": reward,
            "max_prompt_length": PPO_PROMPT_TOKENS,  # longer ones are left out
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 32,
            "total_episodes": 32 * given.ppo_updates,
            "num_epochs": 4,
            "num_minibatches": 2,
            "learning_rate": 3e-4,
            "kl.coef": 0.02,
            "eval_prompts": 0,
        },
    }
    judges = {"reward_model": reward}
    judge = reward_model(given, name, swapped=True)
    judges["judge"] = given.out / f"judge-{name}/adapter"
    found: dict[str, Any] = {"judge": judge, "against_sft": {}}
    for policy in given.policies:
        result = train(given, f"rlhf.{policy}", f"{policy}-{name}", settings[policy])
        adapter = given.out / f"{policy}-{name}/adapter"
        found["against_sft"][policy] = {
            "kl": result.get("kl"),
            **{by: compare(given, policy, adapter, start, by, judges[by]) for by in judges},
        }
    return found


def compare(
    given: argparse.Namespace, policy: str, adapter: Path, start: Path, by: str, judge: Path
) -> dict[str, Any]:
    """Return how a policy's greedy answers score beside SFT's."""
    path = given.out / f"compare-{policy}-{by}.json"
    if not path.exists():
        command = [sys.executable, "-m", "train.evaluate", "--adapter", str(adapter)]
        command += ["--against", str(start), "--metric", "reward", "--reward-model", str(judge)]
        command += ["--file", str(given.out / f"{given.policy_set}-asked.jsonl"), "--json"]
        command += ["--models-dir", str(given.models_dir), "--max-tokens", str(NEW_TOKENS)]
        command += ["--base-model", given.base_model]
        command += ["--threads", str(given.threads)] if given.threads else []
        done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
        path.write_bytes(done.stdout)
    result = json.loads(path.read_text("utf-8"))
    told = result["against"]["differences"]["reward"]
    return {
        "prompts": result["questions"],
        "reward": result["reward"],
        "sft_reward": result["against"]["reward"],
        "win_rate": told["win_rate"],
        "difference_interval": told["interval"],
        "p_value": told["p_value"],
    }


def tables(told: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| set | trained on | test pairs | accuracy (95 %) | longer wins |",
        "|---|---|---|---|---|",
    ]
    for name, card in told["sets"].items():
        low, high = card["accuracy_interval"]
        lines.append(
            f"| {name} | {card['train_pairs']} | {card['pairs']} | {card['accuracy']:.3f} "
            f"({low:.3f} to {high:.3f}) | {card['longer_wins']:.3f} |"
        )
    for policy, judged in told.get("policies", {}).get("against_sft", {}).items():
        for by in ("reward_model", "judge"):
            found = judged[by]
            scores = f"score {found['sft_reward']:.3f} to {found['reward']:.3f}"
            lines.append(
                f"{policy} by {by}: wins {found['win_rate']:.1%} of {found['prompts']} over SFT, "
                f"{scores} (p {found['p_value']:.3f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
