"""Learning from several responses to a prompt, with no value model: RLOO and GRPO, by TRL.

The responses come from the engine, the rewards from the same sources as PPO's.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf.actor_critic import POLICY, REFERENCE, REWARD, ActorCritic, copy_adapter, load_role
from rlhf.evaluate import Answers, compare, gate, summarize
from rlhf.experience import response_kl, shape_scores
from rlhf.ppo_setup import prompt_room, read_prompts
from rlhf.prompts import Prompt, PromptStream
from rlhf.reward_model import read_head
from rlhf.rewards import BATCH_TOKENS, RewardSource, make_source, without_numbers
from rlhf.rollout import GREEDY_ENOUGH, Sample, Sampler, describe, seed_of, under_another_name
from rlhf.trl_config import GrpoConfig, RlooConfig
from rlhf.trl_run import (
    Steps,
    arguments,
    callbacks,
    num_processes,
    plan_steps,
    start_policy,
    train_policy,
)
from rlhf.watch import Watch
from train.base_model import Base, load_base
from train.callbacks import Stopper
from train.run import RunFolder

JUDGING: frozenset[str] = frozenset()  # its evaluations are among the steps, and decide nothing
SHOWN = 2  # rollouts of a step in the table of completions
CURVES = (
    *(("reward", "reward"), ("eval/reward", "evaluation"), ("kl", "KL")),
    ("completions/mean_length", "tokens"),
)


@dataclass
class GroupRun:
    """Everything that a run needs before its first step."""

    config: RlooConfig | GrpoConfig
    base: Base
    roles: ActorCritic
    sampler: Sampler
    source: RewardSource
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    steps: Steps
    warnings: list[str]

    def close(self) -> None:
        """Give back the engine and the source of rewards."""
        self.sampler.close()
        self.source.close()


def set_up(config: RlooConfig | GrpoConfig) -> GroupRun:
    """Load and check everything.

    Raises:
        ToolkitError: The base, the adapters, the prompts or the settings do not fit together.
    """
    base = load_base(config)
    room = prompt_room(config, base)
    prompts, eval_prompts, warnings = read_prompts(config, base, room)
    head = read_head(config.reward.model, base.fingerprint) if config.reward.model else None
    longest = max(len(prompt.ids) for prompt in (*prompts, *eval_prompts))
    total = max(1, config.total_episodes // config.batch_size) * config.num_iterations
    device = base.model.device.type
    steps = plan_steps(config, total, longest + config.max_new_tokens, device)
    model = start_policy(config, base)
    copy_adapter(model, POLICY, REFERENCE)
    if head is not None and config.reward.model is not None:
        load_role(model, config.reward.model, REWARD)
    roles = ActorCritic(model, config.temperature)
    if head is not None:
        roles.add_head(REWARD, head.weight)
    roles.freeze_all_but((POLICY,))
    source = make_source(config.reward, roles, head.normalizer if head else None, base)
    rows = max(config.batch_size // num_processes(), len(eval_prompts))
    sampler = Sampler(base, config.device, longest + config.max_new_tokens, rows, True)
    return GroupRun(*(config, base, roles, sampler, source, prompts, eval_prompts, steps, warnings))


def train(
    job: GroupRun, run: RunFolder, stopper: Stopper, checkpoint: Path | None
) -> dict[str, Any] | None:
    """Train; returns the outcome, or None when told to stop."""
    config = job.config
    stopper.every = config.num_iterations  # TRL begins a batch anew where a run is resumed
    start = _answer(job, run, None, 0)
    trainer = _make_trainer(job, run, stopper)
    evaluations = Evaluations(job, run, trainer, trainer.episodes.clock)
    trainer.add_callback(evaluations)

    def judge() -> dict[str, Any]:
        if not job.eval_prompts:
            return {}
        end = evaluations.last or _answer(job, run, "final", job.steps.total)
        total, count = response_kl(job.roles, end.samples, BATCH_TOKENS)
        found = {"comparison": compare(start, end), "kl": total / max(count, 1)}
        return found | {"gate": gate(found)}

    rows = [prompt.ids for prompt in job.prompts[:3]]
    method = "RLOO" if isinstance(config, RlooConfig) else "GRPO"
    return train_policy(
        *(trainer, config, job.base, run, stopper, checkpoint, method, rows, judge, CURVES)
    )


def _make_trainer(job: GroupRun, run: RunFolder, stopper: Stopper) -> EngineRloo | EngineGrpo:
    config, steps = job.config, job.steps
    episodes = Episodes(job, run)
    common = arguments(config, job.base, run, steps, evaluates=False) | {
        "num_generations": config.num_generations,
        "num_iterations": config.num_iterations,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "beta": config.beta,
        "epsilon": config.clip_range,
        "steps_per_generation": steps.accumulation,
        "shuffle_dataset": False,
        "log_completions": False,
        "disable_dropout": True,  # rewards and log-probabilities are read in training mode
    }
    batches = steps.total // config.num_iterations
    each = config.batch_size // config.num_generations
    # The prompts of the whole run in their order: TRL's own begins anew where a run is resumed, and
    # leaves out what does not fill a batch.
    order = PromptStream(len(job.prompts), config.seed).take(0, batches * each)
    parts: dict[str, Any] = {
        "model": job.roles.model,
        "reward_funcs": [episodes.score],
        "train_dataset": Dataset.from_list([{"prompt": str(index)} for index in order]),
        "processing_class": job.base.tokenizer,
        "callbacks": [*callbacks(run, job.base, config, stopper, steps), Alarms(run)],
    }
    if isinstance(config, RlooConfig):
        return EngineRloo(episodes, args=RLOOConfig(**common), **parts)
    scale = "group" if config.scale_rewards else "none"
    return EngineGrpo(episodes, args=GRPOConfig(scale_rewards=scale, **common), **parts)


class _Clock:
    """Where the time of the steps since the last record went; evaluations are left out."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._since = time.monotonic()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._spent[name] += time.monotonic() - started

    def take(self) -> dict[str, float]:
        """Return seconds as a record has them, and begin again."""
        now = time.monotonic()
        whole = now - self._since - self._spent["eval"]
        rollout, score = self._spent["rollout"], self._spent["score"]
        self._spent.clear()
        self._since = now
        split = {"rollout": rollout, "score": score, "train": whole - rollout - score}
        return {f"time/{name}": round(value, 3) for name, value in split.items()}


class Episodes:
    """Samples and scores for TRL's trainers; a prompt travels through them as its index."""

    def __init__(self, job: GroupRun, run: RunFolder):
        self._job, self._run = job, run
        self.clock = _Clock()
        self._made: dict[tuple[str, tuple[int, ...]], Sample] = {}
        self.step = 0
        self.rank, self.size = 0, 1  # of the processes
        self.accelerator: Any = None  # joins them, once there is one

    def prompt_ids(self, indices: Sequence[str]) -> list[list[int]]:
        return [list(self._job.prompts[int(index)].ids) for index in indices]

    def sample(self, indices: Sequence[str]) -> list[list[int]]:
        """Return one response to each prompt."""
        job = self._job
        seeds = [
            seed_of(job.config.seed, self.step, place * self.size + self.rank)
            for place in range(len(indices))
        ]
        with self.clock.timing("rollout"):
            samples = job.sampler.sample(
                job.roles.policy_adapter(),
                [job.prompts[int(index)] for index in indices],
                seeds,
                job.config.max_new_tokens,
                job.config.temperature,
            )
        self._made = {
            (index, sample.response): sample for index, sample in zip(indices, samples, strict=True)
        }
        return [list(sample.response) for sample in samples]

    def score(
        self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        """Return the shaped reward of each response; TRL calls it as a reward function.

        One without a reward is None: TRL leaves it out of its group's mean, and of learning.
        """
        samples = [
            self._made[index, tuple(ids)]
            for index, ids in zip(prompts, completion_ids, strict=True)
        ]
        with self.clock.timing("score"):
            raw = self._job.source.score(samples)
        skipped = [math.isnan(score) for score in raw]
        num_skipped, num_scored = self._of_all(sum(skipped), len(skipped))
        if num_skipped == num_scored:
            raise without_numbers(self._job.config.reward, samples)
        if self.rank == 0:
            if num_skipped:
                message = f"{num_skipped} responses without a finite reward skipped"
                self._run.tell(message, level="warn", step=self.step)
            for sample, score in zip(samples[:SHOWN], raw, strict=False):
                row = describe(sample, score=score, step=self.step, kind="rollout")
                self._run.append(self._run.completions, row)
        shaped = shape_scores(raw, samples, self._job.config.reward, stops=True)
        return [None if skip else score for skip, score in zip(skipped, shaped, strict=True)]

    def _of_all(self, *counts: int) -> list[int]:
        """Return the sums of counts over all processes."""
        if self.accelerator is None:
            return list(counts)
        found: torch.Tensor = self.accelerator.reduce(
            torch.tensor(counts, device=self.accelerator.device), "sum"
        )
        return [int(count) for count in found]


class Evaluations(TrainerCallback):
    """Answers the fixed prompts every so many steps and after the last; the numbers are logged.

    Args:
        clock: Of the run's steps, which the answers are no part of.

    Attributes:
        last: The answers after the last step; None before, as in a run that had ended already.
    """

    def __init__(self, job: GroupRun, run: RunFolder, trainer: Trainer, clock: _Clock):
        self._job, self._run, self._trainer = job, run, trainer
        self._clock = clock
        self.last: Answers | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        job, step = self._job, state.global_step
        is_last = step == state.max_steps
        is_due = is_last or step % job.config.eval_every == 0
        if not (is_due and job.eval_prompts and state.is_world_process_zero):
            return
        with self._clock.timing("eval"):
            answers = _answer(job, self._run, "final" if is_last else "eval", step)
        self.last = answers if is_last else None
        numbers = {f"eval_{name}": value for name, value in summarize(answers).items()}
        finite = {name: round(v, 6) for name, v in numbers.items() if math.isfinite(v)}
        due = control.should_log
        Trainer.log(self._trainer, finite)  # TRL's own adds its training's numbers
        control.should_log = due  # the step's own numbers are still to be logged, by all processes


class Alarms(TrainerCallback):
    """Tells what looks wrong in TRL's numbers, as a PPO run does of its own."""

    def __init__(self, run: RunFolder):
        self._step = 0

        def tell(message: str, kind: str) -> None:
            run.tell(message, level="warn", step=self._step, alarm=kind)

        self._watch = Watch(tell, stops_at_eos=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "reward" not in logs or not state.is_world_process_zero:
            return
        self._step = state.global_step
        self._watch.look(
            {
                "objective/kl": logs.get("kl", 0.0) * logs["completions/mean_length"],
                "objective/scores": logs["reward"],
                "objective/score_std": logs["reward_std"],
                "score/eos_rate": 1 - logs["completions/clipped_ratio"],
                "response/length_mean": logs["completions/mean_length"],
            }
        )


class _Sampling:
    """What RLOO and GRPO have in common: prompts by index, responses from the engine."""

    episodes: Episodes

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, ...]:
        self.indices = prompts
        return self.episodes.prompt_ids(prompts), None, {}

    def log(self, logs: dict[str, float], *given: Any) -> None:
        """Log TRL's numbers, those of a step with where its time went."""
        trainer: Any = super()
        trainer.log(logs | self.episodes.clock.take() if "loss" in logs else logs, *given)

    def _sample(self) -> list[list[int]]:
        state: Any = getattr(self, "state")  # noqa: B009 - of the trainer beside
        self.episodes.step = int(state.global_step)
        accelerator: Any = getattr(self, "accelerator")  # noqa: B009
        self.episodes.rank = int(accelerator.process_index)
        self.episodes.size = int(accelerator.num_processes)
        self.episodes.accelerator = accelerator
        return self.episodes.sample(self.indices)


class EngineRloo(_Sampling, RLOOTrainer):
    """RLOOTrainer that samples by the engine."""

    def __init__(self, episodes: Episodes, **kwargs: Any):
        self.episodes = episodes
        super().__init__(**kwargs)

    def _generate_single_turn(self, *_: Any) -> list[list[int]]:
        return self._sample()


class EngineGrpo(_Sampling, GRPOTrainer):
    """GRPOTrainer that samples by the engine."""

    def __init__(self, episodes: Episodes, **kwargs: Any):
        self.episodes = episodes
        super().__init__(**kwargs)

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._sample(), None


@torch.no_grad()
def _answer(job: GroupRun, run: RunFolder, kind: str | None, step: int) -> Answers:
    """Answer the fixed prompts, nearly greedily; `kind` is None where they are not written down."""
    prompts: Sequence[Prompt] = job.eval_prompts
    if not prompts:
        return Answers([], [])
    policy = under_another_name(job.roles.policy_adapter(), "eval")
    seeds = [seed_of(job.config.seed, -1, index) for index in range(len(prompts))]
    length = job.config.max_new_tokens
    samples = job.sampler.sample(policy, prompts, seeds, length, GREEDY_ENOUGH)
    scores = job.source.score(samples)
    if kind is not None:
        rows: list[Mapping[str, Any]] = [
            describe(sample, score=score, step=step, kind=kind)
            for sample, score in zip(samples, scores, strict=True)
        ]
        for row in rows:
            run.append(run.completions, row)
    return Answers(samples, scores)
