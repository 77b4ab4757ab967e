"""Does PPO on a learned reward raise what the reward stands for, and when does it stop to?

Gold is a fixed scorer of sentiment, fitted to people's ratings (`scorer.py`). A policy learns to
continue such texts (SFT); pairs of its samples are compared by gold, with noise; a reward model
learns the comparisons, and PPO the reward model. Gold is watched, never learned from. Beside it:
best-of-n by the same reward model. Steps whose result is there are not done again.

    python -m benchmarks.gold.experiment --ratings train.jsonl --test test.jsonl --out runs/gold
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gold import scorer

ROOT = Path(__file__).parents[2]
PROMPT_WORDS = 4
NEW_TOKENS = 24
TEMPERATURE = 0.7
NOISE = 1.5  # slope of a comparison's probability, per standard deviation of gold
BUDGETS = (2, 5, 10)  # nats a response
BEST_OF = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", type=Path, required=True, help="rows of text and rating")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1500, help="that SFT learns")
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=36)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--num-epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    parser.add_argument("--bon-prompts", type=int, default=48)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["HONE_GOLD"] = str((given.out / "gold.npz").resolve())
    told: dict[str, Any] = {"gold": fit_gold(given), "settings": describe(given)}
    write_texts(given)
    train(given, "train.sft", "sft", sft_settings(given))
    samples = sample_all(given, "samples", given.comparisons, 2)
    many = sample_all(given, "many", given.bon_prompts, max(BEST_OF))
    told["gold_of_sft"] = statistics.fmean(g for row in many for g in gold(row))
    runs = []
    for seed in range(given.seeds):
        told_wrong = compare(given, samples, seed)
        train(given, "rlhf.reward", f"reward-{seed}", reward_settings(given, seed))
        train(given, "rlhf.ppo", f"ppo-{seed}", ppo_settings(given, seed))
        runs.append({"wrong_comparisons": told_wrong, **frontier(given, many, seed)})
    told["runs"] = runs
    told["at_budget"] = at_budgets(runs)
    (given.out / "result.json").write_text(json.dumps(told, indent=2))
    draw(runs, told["gold_of_sft"], given.out / "gold.svg")
    print(json.dumps({name: told[name] for name in ("gold", "gold_of_sft", "at_budget")}, indent=2))


def describe(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if not isinstance(value, Path)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fit_gold(given: argparse.Namespace) -> dict[str, float]:
    """Fit the gold scorer; returns how well it predicts ratings that it has not seen."""
    rows, held = read(given.ratings), read(given.test)
    path = Path(os.environ["HONE_GOLD"])
    if not path.exists():
        weights = scorer.fit([row["text"] for row in rows], [row["rating"] for row in rows])
        np.savez(path, weights=weights)
    found = scorer.score([""] * len(held), [row["text"] for row in held])
    truth = [row["rating"] for row in held]
    return {"correlation_on_test": round(float(np.corrcoef(found, truth)[0, 1]), 3)}


def write_texts(given: argparse.Namespace) -> None:
    """Write what SFT learns, and prompts that it does not."""
    rows = [row["text"].split() for row in read(given.ratings)]
    rows = [words for words in rows if 8 <= len(words) <= 24]
    random.Random(0).shuffle(rows)
    pairs = [
        {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[4:])}
        for words in rows
    ]
    learned, rest = pairs[: given.texts], pairs[given.texts :]
    write(given.out / "sft.jsonl", learned)
    prompts = [{"prompt": pair["prompt"]} for pair in rest]
    write(given.out / "prompts-many.jsonl", prompts[: given.bon_prompts])
    others = prompts[given.bon_prompts :]
    write(given.out / "prompts-samples.jsonl", (others * 3)[: given.comparisons])
    write(given.out / "prompts-ppo.jsonl", others)


def train(given: argparse.Namespace, module: str, name: str, settings: Mapping[str, Any]) -> None:
    """Run a trainer, unless its result is there; a run that was cut off goes on."""
    folder = given.out / name
    if (folder / "result.json").exists():
        return
    words = [f"{key}={value}" for key, value in settings.items()]
    words += [f"output_dir={folder}", f"base_model={given.base_model}"]
    words += [f"models_dir={given.models_dir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)


def sft_settings(given: argparse.Namespace) -> dict[str, Any]:
    return {"train_file": given.out / "sft.jsonl", "num_epochs": 1, "learning_rate": 1e-3}


def reward_settings(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    return {
        "train_file": given.out / f"comparisons-{seed}.jsonl",
        "start_adapter": given.out / "sft/adapter",
        "num_epochs": 1,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "max_new_tokens": NEW_TOKENS,
        "normalize_on": "validation",
        "seed": seed,
    }


def ppo_settings(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    return {
        "prompts_file": given.out / "prompts-ppo.jsonl",
        "start_adapter": given.out / "sft/adapter",
        "reward.model": given.out / f"reward-{seed}/adapter",
        "gold.function": "benchmarks.gold.scorer:score",
        "max_new_tokens": NEW_TOKENS,
        "temperature": TEMPERATURE,
        "batch_size": given.batch,
        "total_episodes": given.batch * given.updates,
        "num_epochs": given.num_epochs,
        "learning_rate": given.learning_rate,
        "kl.coef": given.kl_coef,
        "eval_prompts": 0,
        "seed": seed,
    }


def sample_all(given: argparse.Namespace, name: str, count: int, each: int) -> list[dict[str, Any]]:
    """Return `each` samples of the SFT policy to each of `count` prompts."""
    path = given.out / f"{name}.jsonl"
    if path.exists():
        return read(path)
    from rlhf.prompts import load_prompts
    from rlhf.rollout import Sampler, seed_of
    from serve.engine.base import AdapterRef
    from train.base_model import load_base
    from train.config import SftConfig

    config = SftConfig(
        base_model=given.base_model,
        models_dir=given.models_dir,
        train_file=given.out / "sft.jsonl",
        output_dir=given.out,
    )
    base = load_base(config)
    prompts = load_prompts(given.out / f"prompts-{name}.jsonl", base.tokenizer, 256).rows[:count]
    sampler = Sampler(base, "cpu", 256 + NEW_TOKENS, 64, True)
    policy = AdapterRef("sft", str(given.out / "sft/adapter"))
    asked = [prompt for prompt in prompts for _ in range(each)]
    seeds = [seed_of(7, each, index) for index in range(len(asked))]
    found = []
    for at in range(0, len(asked), 64):
        part = slice(at, at + 64)
        found += sampler.sample(policy, asked[part], seeds[part], NEW_TOKENS, TEMPERATURE)
        print(f"{name}: {len(found)} of {len(asked)}", file=sys.stderr)
    sampler.close()
    rows = [
        {
            "prompt": prompt.text,
            "prompt_ids": list(prompt.ids),
            "samples": [s.text for s in found[i * each : (i + 1) * each]],
            "sample_ids": [list(s.response) for s in found[i * each : (i + 1) * each]],
        }
        for i, prompt in enumerate(prompts)
    ]
    write(path, rows)
    return rows


def gold(row: Mapping[str, Any]) -> list[float]:
    return scorer.score([row["prompt"]] * len(row["samples"]), row["samples"])


def compare(given: argparse.Namespace, samples: Sequence[Mapping[str, Any]], seed: int) -> float:
    """Write noisy comparisons; returns the share that is the wrong way round."""
    draw = random.Random(seed)
    told_apart = [
        row
        for row in samples
        if all(map(str.strip, row["samples"])) and len(set(row["samples"])) > 1
    ]
    pairs = [(row, *gold(row)) for row in told_apart]
    spread = statistics.pstdev([value for _, *both in pairs for value in both])
    rows, wrong = [], 0
    for row, first, second in pairs:
        is_first = draw.random() < 1 / (1 + math.exp(-NOISE * (first - second) / spread))
        wrong += is_first != (first > second)
        order = row["samples"] if is_first else row["samples"][::-1]
        rows.append({"prompt": row["prompt"], "chosen": order[0], "rejected": order[1]})
    write(given.out / f"comparisons-{seed}.jsonl", rows)
    return round(wrong / len(rows), 3)


def frontier(
    given: argparse.Namespace, many: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Return gold and proxy against KL, of PPO's updates and of best-of-n."""
    records = read(given.out / f"ppo-{seed}/metrics.jsonl")
    ppo = [
        {"kl": r["objective/kl"], "gold": r["objective/gold_score"], "proxy": r["objective/scores"]}
        for r in records
    ]
    proxy = score_by_model(given, many, seed)
    bon = []
    for n in BEST_OF:
        best = [best_of(gold(row), scores, n) for row, scores in zip(many, proxy, strict=True)]
        top = [best_of(scores, scores, n) for scores in proxy]
        kl = math.log(n) - (n - 1) / n  # an upper bound (arXiv:2401.01879)
        bon.append(
            {"n": n, "kl": kl, "gold": statistics.fmean(best), "proxy": statistics.fmean(top)}
        )
    pairs = [
        pair
        for row, scores in zip(many, proxy, strict=True)
        for pair in zip(gold(row), scores, strict=True)
    ]
    card = json.loads((given.out / f"reward-{seed}/result.json").read_text())
    return {
        "seed": seed,
        "ppo": ppo,
        "best_of_n": bon,
        "proxy_gold_correlation": round(float(np.corrcoef(np.array(pairs).T)[0, 1]), 3),
        "reward_model": {
            k: card[k] for k in ("accuracy", "accuracy_interval", "longer_wins") if k in card
        },
    }


def best_of(values: Sequence[float], by: Sequence[float], n: int) -> float:
    """Return the mean value of the best of n by another score, over all choices of n samples."""
    order = sorted(range(len(by)), key=by.__getitem__)
    total = math.comb(len(by), n)
    return sum(math.comb(rank, n - 1) / total * values[index] for rank, index in enumerate(order))


@torch.no_grad()
def score_by_model(
    given: argparse.Namespace, many: Sequence[Mapping[str, Any]], seed: int
) -> list[list[float]]:
    """Return a seed's reward of each sample, read as PPO reads it."""
    from rlhf.actor_critic import REWARD, ActorCritic, load_role, with_policy
    from rlhf.reward_model import read_head
    from train.base_model import load_base
    from train.config import LoraSettings, SftConfig
    from train.lora import lora_config

    config = SftConfig(
        base_model=given.base_model,
        models_dir=given.models_dir,
        train_file=given.out / "sft.jsonl",
        output_dir=given.out,
    )
    base = load_base(config)
    folder = given.out / f"reward-{seed}/adapter"
    head = read_head(folder, base.fingerprint)
    model = with_policy(base.model, lora_config(LoraSettings(r=1), base.model))
    load_role(model, folder, REWARD)
    roles = ActorCritic(model, TEMPERATURE)
    roles.add_head(REWARD, head.weight)
    found = []
    for row in many:
        rows = [(*row["prompt_ids"], *ids) for ids in row["sample_ids"]]
        found.append(head.normalizer.apply(roles.rewards(rows)).tolist())
    return found


def at_budgets(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return gold near each KL budget, seed by seed, beside best-of-n at the same KL."""
    found = []
    for budget in BUDGETS:
        ppo = []
        for run in runs:
            near = [r["gold"] for r in run["ppo"] if 0.7 * budget <= r["kl"] <= 1.3 * budget]
            ppo.append(round(statistics.fmean(near), 3) if near else None)
        bon = [interpolate(run["best_of_n"], budget) for run in runs]
        found.append({"kl": budget, "ppo_gold": ppo, "best_of_n_gold": bon})
    return found


def interpolate(points: Sequence[Mapping[str, float]], kl: float) -> float | None:
    """Return gold at a KL between two n; None beyond the largest n."""
    for low, high in pairwise(points):
        if low["kl"] <= kl <= high["kl"]:
            share = (kl - low["kl"]) / (high["kl"] - low["kl"])
            return round(low["gold"] + share * (high["gold"] - low["gold"]), 3)
    return None


def draw(runs: Sequence[Mapping[str, Any]], start: float, path: Path) -> None:
    """Draw gold and proxy against KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, axis in zip(("gold", "proxy"), axes, strict=True):
        for run in runs:
            color = f"C{run['seed']}"
            kl = [r["kl"] for r in run["ppo"]]
            axis.plot(
                kl,
                [r[name] for r in run["ppo"]],
                ".",
                color=color,
                alpha=0.6,
                label=f"PPO, seed {run['seed']}",
            )
            points = run["best_of_n"]
            axis.plot(
                [p["kl"] for p in points],
                [p[name] for p in points],
                "--",
                color=color,
                label="best of n" if run["seed"] == 0 else None,
            )
        axis.set_xlabel("KL of a response from the SFT policy (nats)")
        axis.set_ylabel(f"mean {name} score")
    axes[0].axhline(start, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
