"""The parts of a PPO run, put together: base with adapters, prompts, engine, source of rewards."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import set_seed

from data.errors import ConfigError, DataError
from rlhf.actor_critic import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    ActorCritic,
    copy_adapter,
    load_role,
    with_policy,
)
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_math import Reduce
from rlhf.prompts import Prompt, load_prompts
from rlhf.reward_model import RewardHead, read_head
from rlhf.rewards import RewardSource, make_source
from rlhf.rollout import Sampler, twin
from rlhf.shared_prompts import of_prompts, warn_of_shared
from rlhf.trl_config import GroupConfig
from train.base_model import Base, load_base
from train.batches import name_lines
from train.config import GPU_MICRO_BATCH_TOKENS
from train.lora import lora_config
from train.start import read_shape, set_weights

CPU_TOKENS = 512  # that go through the model at once: half of the activations of SFT's 1,024
FEWEST_HELD_OUT = 4  # the prompts must be so many times those held out for evaluation


@dataclass(frozen=True)
class Team:
    """The processes of a run; `reduce` sums a tensor over them, and is None where there is one."""

    rank: int
    size: int
    reduce: Reduce | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return value if self.reduce is None else self.reduce(value)

    def agree(self, value: float) -> float:
        """Return the main process's number to all."""
        return float(self.sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)))


@dataclass
class PpoRun:
    """Everything that a run needs before its first update."""

    config: PpoConfig
    base: Base
    roles: ActorCritic
    sampler: Sampler
    source: RewardSource
    gold: RewardSource | None
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    team: Team
    max_tokens: int
    warnings: list[str]

    def close(self) -> None:
        """Give back the engine and the source of rewards."""
        self.sampler.close()
        self.source.close()
        if self.gold is not None:
            self.gold.close()


def join_team(device: str) -> Team:
    """Join the processes that `accelerate launch` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team(0, 1, None)
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())

    def reduce(value: Tensor) -> Tensor:
        summed = accelerator.reduce(value.to(accelerator.device), reduction="sum")
        return summed.to(value.device)

    return Team(accelerator.process_index, accelerator.num_processes, reduce)


def set_up(config: PpoConfig) -> PpoRun:
    """Load and check everything.

    Raises:
        ToolkitError: The base, the adapters, the prompts or the settings do not fit together.
    """
    team = join_team(config.device)
    if config.batch_size % team.size:
        raise ConfigError(
            [
                f"batch_size is {config.batch_size}, which {team.size} processes cannot share; "
                f"give a multiple of {team.size}"
            ]
        )
    for name in ("prompts_file", "eval_prompts_file"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise DataError(f"{name} {path} is not a file", param=name, code="file_not_found")
    set_seed(config.seed)
    base = load_base(config)
    room = prompt_room(config, base)
    prompts, eval_prompts, warnings = read_prompts(config, base, room)
    head = read_head(config.reward.model, base.fingerprint) if config.reward.model else None
    shared = twin(base.model)
    roles = build_roles(config, base, head)
    longest = max(len(prompt.ids) for prompt in (*prompts, *eval_prompts))
    sampler = Sampler(
        base,
        config.device,
        longest + config.max_new_tokens,
        config.batch_size // team.size,
        config.stop_at_eos,
        shared,
    )
    by_device = CPU_TOKENS
    if base.model.device.type != "cpu":
        by_device = GPU_MICRO_BATCH_TOKENS
    max_tokens = config.micro_batch_tokens if config.micro_batch_tokens != "auto" else by_device
    normalizer = head.normalizer if head else None
    try:
        source = make_source(config.reward, roles, normalizer, base)
    except BaseException:
        sampler.close()
        raise
    gold = None
    try:
        if config.gold is not None:
            gold = make_source(config.gold, roles, None, base)
    except BaseException:
        sampler.close()
        source.close()
        raise
    return PpoRun(
        *(config, base, roles, sampler, source, gold, prompts, eval_prompts),
        *(team, max_tokens, warnings),
    )


def build_roles(config: PpoConfig, base: Base, head: RewardHead | None) -> ActorCritic:
    """Put the adapters and heads of all roles on the base.

    Raises:
        ToolkitError: An adapter does not belong to the base.
    """
    own = lora_config(config.lora, base.model)  # while its layers are plain ones
    shape = read_shape(config.start_adapter, base, 0.0) if config.start_adapter else own
    model = with_policy(base.model, shape)
    if config.start_adapter is not None:
        set_weights(model, config.start_adapter)
        load_role(model, config.start_adapter, REFERENCE)
    if head is not None and config.reward.model is not None:
        load_role(model, config.reward.model, REWARD)
    shared = config.value.trunk == "shared"
    if not shared and config.value_starts_as_reward:
        copy_adapter(model, REWARD, VALUE)
    elif not shared:
        model.add_adapter(VALUE, copy.deepcopy(own))
    roles = ActorCritic(model, config.temperature, shared)
    if head is not None:
        roles.add_head(REWARD, head.weight)
    if head is not None and config.value_starts_as_reward:
        scale = head.normalizer
        roles.add_head(VALUE, head.weight / scale.std, -scale.mean / scale.std)
    else:
        roles.add_head(VALUE)
    roles.freeze_all_but((POLICY, VALUE))
    if config.entropy_coef:
        roles.let_entropy_train()
    if config.gradient_checkpointing:
        roles.checkpoint_activations()
    return roles


def prompt_room(config: PpoConfig | GroupConfig, base: Base) -> int:
    """Return the most tokens of a prompt.

    Raises:
        ConfigError: `max_new_tokens` leaves no room for one.
    """
    if config.max_new_tokens >= base.context_length:
        raise ConfigError(
            [
                f"max_new_tokens is {config.max_new_tokens}, but {base.name} reads "
                f"{base.context_length} tokens, prompt included; give fewer"
            ]
        )
    return min(config.max_prompt_length, base.context_length - config.max_new_tokens)


def read_prompts(
    config: PpoConfig | GroupConfig, base: Base, room: int
) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """Return the prompts to learn on, those to evaluate on, and what to warn of.

    Those that are held out share no prompt with those to learn on, whatever else their rows say.
    """
    advice = "raise max_prompt_length"
    if room < config.max_prompt_length:
        advice = (
            f"{base.name} reads {base.context_length} tokens, of which max_new_tokens takes "
            f"{config.max_new_tokens}: lower it, or shorten the prompts"
        )
    warnings: list[str] = []

    def load(path: Path, which: str) -> list[Prompt]:
        found = load_prompts(path, base.tokenizer, room, advice)
        if found.too_long:
            warnings.append(
                f"{len(found.too_long)} prompts{which} dropped, longer than {room} tokens: "
                f"{name_lines(found.too_long)}; {advice}"
            )
        if found.repeated:
            warnings.append(
                f"{len(found.repeated)} prompts{which} left out, as they say what an earlier line "
                f"says: {name_lines(found.repeated)}"
            )
        return found.rows

    prompts, count = load(config.prompts_file, ""), config.eval_prompts
    if config.eval_prompts_file is not None:
        apart = load(config.eval_prompts_file, " of the evaluations")[:count]
        warnings += warn_of_shared(of_prompts(prompts), of_prompts(apart), "eval_prompts_file")
        return prompts, apart, warnings
    different = len({prompt.ids for prompt in prompts})
    if len(prompts) < FEWEST_HELD_OUT * count or different == 1:
        if count:
            warnings.append(
                f"only {different} different prompts: the {min(count, len(prompts))} of the "
                "evaluations are also learned on"
            )
        return prompts, prompts[:count], warnings
    held = _hold_out(prompts, count, config.seed)
    return (
        [prompt for prompt in prompts if prompt.ids not in held],
        [prompt for prompt in prompts if prompt.ids in held][:count],
        warnings,
    )


def _hold_out(prompts: Sequence[Prompt], count: int, seed: int) -> set[tuple[int, ...]]:
    """Choose prompts by their ids, all rows of each, until there are `count` rows."""
    rows = Counter(prompt.ids for prompt in prompts)
    ids = list(rows)
    generator = torch.Generator().manual_seed(seed)
    held: set[tuple[int, ...]] = set()
    found = 0
    for index in torch.randperm(len(ids), generator=generator).tolist():
        if found >= count or len(held) == len(ids) - 1:  # one at least is learned on
            break
        held.add(ids[index])
        found += rows[ids[index]]
    return held
