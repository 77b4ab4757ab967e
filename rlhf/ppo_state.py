"""What a PPO run needs to go on as if it had not stopped: one folder a checkpoint.

Everything random is drawn from the run's seed and the update's number, so no generator's state is
among it. The policy lies there as PEFT writes it, so that a checkpoint can be served.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.actor_critic import POLICY, VALUE, ActorCritic
from rlhf.updates import Learner
from train.run import COMPLETE, RunFolder, step_of, write_json

STATE, VALUE_FILE, HEADS, OPTIMIZER, BEST = (
    *("state.json", "value.safetensors", "heads.safetensors", "optimizer.pt"),
    "best.safetensors",
)


@dataclass
class Best:
    """The policy with the highest reward so far whose KL was within the budget."""

    update: int
    reward: float
    kl: float
    tensors: dict[str, Tensor]


@dataclass
class Progress:
    """Where a run is: `update` is the next one."""

    update: int = 0
    kl_coef: float = 0.0
    optimizer_steps: int = 0
    skipped: int = 0
    tokens: int = 0
    exploded: bool = False  # beyond `kl.stop`, where no update follows
    best: Best | None = None


def save(
    run: RunFolder, roles: ActorCritic, learner: Learner, progress: Progress, keep: int, base: str
) -> None:
    """Write a checkpoint and mark it whole; older ones beyond `keep` go."""
    folder = run.checkpoints / f"checkpoint-{progress.update}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_policy(roles, folder, base)
    if not roles.shared:
        save_file(_plain(roles.adapter_state(VALUE)), folder / VALUE_FILE)
    save_file(_plain(roles.heads.state_dict()), folder / HEADS)
    torch.save(learner.optimizer.state_dict(), folder / OPTIMIZER)
    best = progress.best
    if best is not None:
        save_file(best.tensors, folder / BEST)
    state = {name: value for name, value in asdict(progress).items() if name != "best"}
    state["best"] = None
    if best is not None:
        reward = None if math.isnan(best.reward) else best.reward  # which JSON cannot say
        state["best"] = {"update": best.update, "reward": reward, "kl": best.kl}
    write_json(folder / STATE, state)
    run.mark_complete(progress.update)
    whole = [path.parent for path in run.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
    for old in sorted(whole, key=step_of)[:-keep]:
        shutil.rmtree(old)


def restore(folder: Path, roles: ActorCritic, learner: Learner) -> Progress:
    """Put a checkpoint back."""
    set_policy(roles, load_file(folder / "adapter_model.safetensors"))
    if not roles.shared:
        set_peft_model_state_dict(roles.model, load_file(folder / VALUE_FILE), VALUE)
    roles.heads.load_state_dict(load_file(folder / HEADS))
    learner.optimizer.load_state_dict(kept_state(folder))
    state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
    kept, best = state.pop("best"), None
    if kept is not None:
        reward = math.nan if kept["reward"] is None else kept["reward"]
        best = Best(kept["update"], reward, kept["kl"], load_file(folder / BEST))
    return Progress(**state, best=best)


def kept_state(folder: Path) -> dict[str, Any]:
    """Return the optimizer's state, in host memory: the device may be another one now."""
    found: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    return found


def save_policy(roles: ActorCritic, folder: Path, base: str) -> None:
    """Write the policy as a plain PEFT folder; `base` is the base's name."""
    roles.model.peft_config[POLICY].base_model_name_or_path = base  # no path of this machine
    roles.model.save_pretrained(
        str(folder),
        safe_serialization=True,
        selected_adapters=[POLICY],
        save_embedding_layers=False,
    )


def policy_tensors(roles: ActorCritic) -> dict[str, Tensor]:
    """Return a copy of the policy's tensors."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _named(roles).items()}


def set_policy(roles: ActorCritic, tensors: dict[str, Tensor]) -> None:
    """Give the policy its tensors."""
    set_peft_model_state_dict(roles.model, tensors, POLICY)


def _named(roles: ActorCritic) -> dict[str, Tensor]:
    return roles.adapter_state(POLICY)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
