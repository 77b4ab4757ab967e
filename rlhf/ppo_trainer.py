"""The loop of PPO: sample, score, read, learn; evaluate, save, and stop by rule.

Everything random comes from the seed and the number of the update, so a run that is killed and
started again gives the same adapters, bit for bit (CPU, float32), and two processes take the same
step as one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf import ppo_state
from rlhf.evaluate import MOST_KL, Answers, compare, gate, summarize
from rlhf.experience import Experience, gather, response_kl
from rlhf.ppo_math import AdaptiveKL, sequence_kl
from rlhf.ppo_setup import PpoRun
from rlhf.ppo_state import Best, Progress
from rlhf.prompts import PromptStream
from rlhf.rewards import without_numbers
from rlhf.rollout import (
    GREEDY_ENOUGH,
    Sample,
    describe,
    seed_of,
    under_another_name,
)
from rlhf.updates import Learner, UpdateStats
from rlhf.wandb_log import WandbLog
from rlhf.watch import Bar, Watch, measure
from train.base_model import Base
from train.callbacks import Stopper
from train.memory import give_back_freed
from train.publish import write_adapter
from train.run import RunFolder

CURVES = (("objective/scores", "score"), ("objective/kl", "KL"), ("eval/reward", "evaluation"))
SHOWN_ROLLOUTS = 2  # of each update, in the table of completions


class PpoTrainer:
    """Trains a policy.

    Args:
        job: What `ppo_setup.set_up` made.
        run: Where it is written.
        stopper: Tells when to end in order.
    """

    def __init__(self, job: PpoRun, run: RunFolder, stopper: Stopper):
        self._job, self._run, self._stopper = job, run, stopper
        self._config, self._team, self._roles = job.config, job.team, job.roles
        self._learner = Learner(job.roles, job.config, job.max_tokens, job.team.reduce)
        self._stream = PromptStream(len(job.prompts), job.config.seed)
        self._progress = Progress(kl_coef=job.config.kl.coef)
        self._first_policy = ppo_state.policy_tensors(job.roles)
        self._watch = Watch(self._alarm, job.config.stop_at_eos)
        self._seconds: dict[str, float] = {}

    def train(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """Run to the end; returns the outcome, or None when told to stop.

        Raises:
            TrainingFailed: A loss is not finite, or the rewards fail.
        """
        config, team = self._config, self._team
        if checkpoint is not None:
            self._progress = ppo_state.restore(checkpoint, self._roles, self._learner)
            if team.is_main:
                self._watch.history += self._run.read(self._run.metrics)
        progress = self._progress
        controller = AdaptiveKL(progress.kl_coef, config.kl.target, config.kl.horizon)
        start = self._start_answers(is_new=checkpoint is None)
        self._stopper.training = True
        log = WandbLog(config.wandb, self._run, team.is_main)
        bar = Bar(config.num_updates, progress.update, team.is_main)
        try:
            while progress.update < config.num_updates and not progress.exploded:
                record = self._update(controller)
                log.write(record)
                bar.show(progress.update, record)
                progress.exploded = record["objective/kl"] > config.kl.stop
                if progress.exploded:
                    self._tell(
                        f"The KL of a response is {record['objective/kl']:.1f}, beyond kl.stop "
                        f"({config.kl.stop:g}): the run ends, and the best policy is kept",
                        level="warn",
                    )
                stopped = bool(team.agree(float(self._stopper.asked.is_set())))
                last = progress.update == config.num_updates or progress.exploded
                if last or stopped or progress.update % config.save_every == 0:
                    self._save()
                if stopped and not last:
                    return None
        finally:
            bar.close()
            log.close()
        return self._finish(start, use_best=progress.exploded or config.kl.budget is not None)

    def _update(self, controller: AdaptiveKL) -> dict[str, Any]:
        """Do one update, log it, and evaluate when it is due."""
        config, progress = self._config, self._progress
        number = progress.update
        self._seconds = {}
        experience = self._collect(number, controller.coef)
        self._learner.set_rate(
            1 - number / config.num_updates if config.lr_scheduler == "linear" else 1.0
        )
        with self._timing("train"):
            stats = self._learner.update(experience, number)
            give_back_freed()
        progress.update += 1
        progress.optimizer_steps += stats.steps
        read = sum(len(s.prompt.ids) + len(s.response) for s in experience.samples)
        progress.tokens += int(self._team.sum(torch.tensor(float(read), dtype=torch.float64)))
        record = self._record(experience, stats, controller.coef) | self._gold(experience.samples)
        if number >= config.value_warmup:  # before, the policy does not move
            controller.update(record["objective/kl"], config.batch_size)
        progress.kl_coef = controller.coef
        if progress.update % config.eval_every == 0 or progress.update == config.num_updates:
            record |= self._judge(experience.samples)
        if self._team.is_main:
            self._run.append(self._run.metrics, record)
            kl = sequence_kl(experience.log_probs, experience.ref_log_probs, experience.mask)
            for index, sample in enumerate(experience.samples[:SHOWN_ROLLOUTS]):
                told = {"score": float(experience.raw[index]), "kl": round(float(kl[index]), 6)}
                row = describe(sample, **told, step=progress.update, kind="rollout")
                self._run.append(self._run.completions, row)
        self._watch.look(record)
        return record

    def _collect(self, number: int, kl_coef: float) -> Experience:
        """Sample this process's part of a batch, score it, and have the roles read it."""
        config, team, job = self._config, self._team, self._job
        places = list(range(team.rank, config.batch_size, team.size))
        each = config.samples_per_prompt
        first = number * (config.batch_size // each)
        order = self._stream.take(first, config.batch_size // each)
        prompts = [job.prompts[order[place // each]] for place in places]
        seeds = [seed_of(config.seed, number, place) for place in places]
        with self._timing("rollout"):
            policy = self._roles.policy_adapter()
            samples = job.sampler.sample(
                policy, prompts, seeds, config.max_new_tokens, config.temperature
            )
        with self._timing("score"):
            raw = job.source.score(samples)
            kept = [
                index
                for index, (sample, score) in enumerate(zip(samples, raw, strict=True))
                if sample.response and not math.isnan(score)
            ]
            self._note_skipped(len(samples) - len(kept), samples)
            return gather(
                self._roles,
                [samples[index] for index in kept],
                [places[index] for index in kept],
                [raw[index] for index in kept],
                config,
                kl_coef,
                job.max_tokens,
                team.sum,
            )

    def _gold(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return the mean gold score of all processes' rollouts, if there is a gold source."""
        if self._job.gold is None:
            return {}
        known = [score for score in self._job.gold.score(samples) if not math.isnan(score)]
        pair = torch.tensor([sum(known), len(known)], dtype=torch.float64)
        total, count = self._team.sum(pair).tolist()
        return {"objective/gold_score": round(total / count, 6)} if count else {}

    def _note_skipped(self, skipped: int, samples: Sequence[Sample]) -> None:
        pair = torch.tensor([skipped, len(samples)], dtype=torch.float64)
        found = self._team.sum(pair).tolist()
        if found[0] == found[1]:
            raise without_numbers(self._config.reward, samples)
        if found[0]:
            self._progress.skipped += int(found[0])
            self._tell(f"{int(found[0])} responses without a finite reward skipped", level="warn")

    def _record(self, experience: Experience, stats: UpdateStats, kl_coef: float) -> dict[str, Any]:
        config, progress = self._config, self._progress
        longest, clip = config.max_new_tokens, config.reward.limit
        numbers = measure(experience, stats, self._seconds, self._team, longest, clip)
        kl, score = numbers["objective/kl"], numbers["objective/scores"]
        return {
            "step": progress.update,
            "total_steps": config.num_updates,
            "episode": progress.update * config.batch_size,
            **{name: round(value, 6) for name, value in numbers.items() if math.isfinite(value)},
            "objective/kl_coef": kl_coef,
            "objective/non_score_reward": round(-kl_coef * kl, 6),
            "objective/rlhf_reward": round(score - kl_coef * kl, 6),
            "lr": self._learner.optimizer.param_groups[0]["lr"],
            "optimizer_steps": progress.optimizer_steps,
            "skipped": progress.skipped,
            "trained_tokens": progress.tokens,
        }

    def _judge(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Evaluate the policy, and keep it if it is the best within the budget.

        Args:
            samples: This process's responses of the update. Their `objective/kl` is that of the
                policy before the update; here it is that of the policy as it is now.
        """
        pair = response_kl(self._roles, samples, self._job.max_tokens)
        total, count = self._team.sum(torch.tensor(pair, dtype=torch.float64)).tolist()
        kl = total / max(count, 1.0)
        answers = self._evaluate(self._progress.update)
        reward = self._team.agree(answers.mean_score)
        budget = self._config.kl.budget or self._config.kl.stop
        best = self._progress.best
        if kl <= budget and (best is None or not reward <= best.reward):
            tensors = ppo_state.policy_tensors(self._roles)
            self._progress.best = Best(self._progress.update, reward, kl, tensors)
        numbers = ({"kl": kl} | summarize(answers)).items()
        found = {f"eval/{name}": round(v, 6) for name, v in numbers if math.isfinite(v)}
        if self._job.gold is not None and answers.samples:
            gold = Answers(answers.samples, self._job.gold.score(answers.samples)).mean_score
            found |= {"eval/gold": gold} if math.isfinite(gold) else {}
        return found

    def _evaluate(self, update: int) -> Answers:
        """Answer the fixed prompts, nearly greedily; the main process does."""
        if not (self._team.is_main and self._job.eval_prompts):
            return Answers([], [])
        return self._answer(update, "eval")

    def _start_answers(self, is_new: bool) -> Answers:
        """Answer the fixed prompts as the policy was at the start: the first that may be best."""
        if is_new:
            answers = self._evaluate(0)
            reward = self._team.agree(answers.mean_score)
            self._progress.best = Best(0, reward, 0.0, self._first_policy)
            return answers
        if not (self._team.is_main and self._job.eval_prompts):
            return Answers([], [])
        now = ppo_state.policy_tensors(self._roles)
        ppo_state.set_policy(self._roles, self._first_policy)
        try:
            return self._answer(0, None)
        finally:
            ppo_state.set_policy(self._roles, now)

    def _answer(self, update: int, kind: str | None) -> Answers:
        job, config = self._job, self._config
        policy = under_another_name(self._roles.policy_adapter(), "eval")
        prompts: Sequence[Any] = job.eval_prompts
        # The same at every evaluation: what changes is the policy's doing.
        seeds = [seed_of(config.seed, -1, index) for index in range(len(prompts))]
        samples: list[Sample] = []
        with job.sampler.awake():
            for at in range(0, len(prompts), config.batch_size):
                part = slice(at, at + config.batch_size)
                samples += job.sampler.sample(
                    policy, prompts[part], seeds[part], config.max_new_tokens, GREEDY_ENOUGH
                )
        scores = job.source.score(samples)
        if kind is not None:
            for sample, score in zip(samples, scores, strict=True):
                row = describe(sample, score=score, step=update, kind=kind)
                self._run.append(self._run.completions, row)
        return Answers(samples, scores)

    def _finish(self, start: Answers, use_best: bool) -> dict[str, Any]:
        """Choose the policy, compare it with the start, write the adapter; returns the outcome."""
        config, progress, team = self._config, self._progress, self._team
        best = progress.best
        if use_best and best is not None:
            ppo_state.set_policy(self._roles, best.tensors)
            self._tell(
                f"The adapter is the policy of update {best.update}: the best reward "
                f"({best.reward:.3f}) at a KL ({best.kl:.2f}) within the budget"
            )
        elif use_best:
            self._tell(
                "No evaluated policy was within the KL budget: the adapter is the last policy",
                level="warn",
            )
        outcome: dict[str, Any] = {
            "updates": progress.update,
            "episodes": progress.update * config.batch_size,
            "optimizer_steps": progress.optimizer_steps,
            "skipped": progress.skipped,
            "trained_tokens": progress.tokens,
            "chosen_update": best.update if use_best and best else progress.update,
        }
        for record in self._watch.history:  # of the update whose policy it is; none of the start
            if record["step"] == outcome["chosen_update"]:
                kl = record.get("eval/kl", record["objective/kl"])
                score, ends = record["objective/scores"], record["score/eos_rate"]
                outcome |= {"kl": kl, "score": score, "eos_rate": ends}
        if use_best and best:
            outcome["kl"] = best.kl
        if team.is_main:
            if self._job.eval_prompts:
                end = self._answer(progress.update, "final")
                outcome["comparison"] = compare(start, end)
                outcome["gate"] = gate(outcome, config.kl.budget or MOST_KL)
            self._write(outcome)
        return outcome

    def _write(self, outcome: Mapping[str, Any]) -> None:
        base: Base = self._job.base
        rows = [prompt.ids for prompt in self._job.prompts[:3]]
        told = ("comparison", "gate")
        summary = {name: value for name, value in outcome.items() if name not in told}
        write_adapter(
            self._run,
            self._roles.model,
            base,
            self._config,
            rows,
            {"method": "PPO", **summary},
            save=lambda folder: ppo_state.save_policy(self._roles, folder, base.name),
            curves=CURVES,
        )

    def _save(self) -> None:
        if self._team.is_main:
            name, keep = self._job.base.name, self._config.keep_checkpoints
            ppo_state.save(self._run, self._roles, self._learner, self._progress, keep, name)
            origin = self._job.base.origin
            self._run.lay_out_model(self._progress.update, origin, keep)
            message = f"Checkpoint created at step {self._progress.update}"
            metrics = {"step": self._progress.update}
            self._tell(message, checkpoint=self._progress.update, metrics=metrics)

    def _alarm(self, message: str, kind: str) -> None:
        self._tell(message, level="warn", alarm=kind)

    def _tell(self, message: str, *, level: str = "info", **data: Any) -> None:
        if self._team.is_main:
            self._run.tell(message, level=level, step=self._progress.update, **data)

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started
