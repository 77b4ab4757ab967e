"""Where rewards come from: a reward model, a Python function, a URL, or a grader of the API.

All get the same samples and return one number each. A number that is not finite is reported as NaN
and the response is skipped by the trainer; a source that fails, hangs or answers with the wrong
number of rewards ends the run, and names the prompt.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx
import torch

from data.errors import ConfigError, TrainingFailed
from rlhf.actor_critic import ActorCritic
from rlhf.reward_model import Normalizer
from rlhf.reward_process import serve_function
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rollout import Sample
from train.base_model import Base
from train.batches import name_lines

BATCH_TOKENS = 2048
RETRY_S = 1.0
START_S = 120.0  # for importing the module of a function
END_S = 5.0  # for a process that closed its pipe to end
SHOWN = 60


class RewardSource(Protocol):
    """Scores responses."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return one score a sample, NaN where there is none.

        Raises:
            TrainingFailed: The source failed.
        """

    def close(self) -> None:
        """Give back what it holds."""


class ModelReward:
    """Normalised scores of the reward adapter on the trainer's own base."""

    def __init__(self, roles: ActorCritic, normalizer: Normalizer):
        self._roles = roles
        self._normalizer = normalizer

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> list[float]:
        rows = [(*sample.prompt.ids, *sample.response) for sample in samples]
        scores = [0.0] * len(rows)
        for part in by_length([len(row) for row in rows], BATCH_TOKENS):
            raw = self._roles.rewards([rows[index] for index in part])
            found = self._normalizer.apply(raw).tolist()
            for index, score in zip(part, found, strict=True):
                scores[index] = score
        return scores

    def close(self) -> None:
        """Nothing to give back."""


class FunctionReward:
    """A function of the user's, in a process of its own so that it can be stopped.

    It is called as `function(prompts=[...], completions=[...], **columns)`, as TRL's reward
    functions are: lists of texts, and one list for each further column of the prompts' file.

    Raises:
        ConfigError: Its module cannot be imported, or not in time.
    """

    def __init__(self, name: str, timeout_s: float):
        self._name = name
        self._timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_function, args=(name, theirs), daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # it is deaf to the signal by which Python would end it
        try:
            self._await_function()  # what is wrong is told before anything is trained
        except BaseException:
            self.close()
            raise

    def score(self, samples: Sequence[Sample]) -> list[float]:
        try:
            self._pipe.send(as_columns(samples))
            if not self._pipe.poll(self._timeout_s):
                self.close()
                raise _failed(
                    f"{self._name} did not answer within timeout_s ({self._timeout_s:g} s)",
                    samples,
                    "reward_timeout",
                )
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise _failed(self._ended(), samples, "reward_failed") from error
        if kind == "error":
            raise _failed(f"{self._name} raised {value}", samples, "reward_failed")
        return read_scores(value, samples, self._name)

    def _await_function(self) -> None:
        """Wait until the process has imported the function.

        Raises:
            ConfigError: It cannot, or it takes too long.
        """
        if not self._pipe.poll(START_S):
            raise ConfigError(
                [
                    f"the reward function {self._name} was not imported within {START_S:g} s; have "
                    "its module load what is slow at the first call"
                ]
            )
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ConfigError([f"{self._ended()} while it imported the function"]) from error
        if kind == "refused":
            raise ConfigError(value)

    def _ended(self) -> str:
        self._process.join(END_S)
        code = self._process.exitcode
        told = "" if code is None else f" (exit code {code})"
        return f"the process of the reward function {self._name} ended{told}"

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


class UrlReward:
    """A server of the user's: POST {"prompts", "completions", columns...} -> {"rewards": [...]}."""

    def __init__(self, url: str, timeout_s: float, retries: int):
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries
        self._tls = httpx.create_ssl_context()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        columns = as_columns(samples)
        for attempt in range(self._retries + 1):
            try:
                body = asyncio.run(self._ask(columns))
                break
            except (httpx.HTTPError, ValueError, TimeoutError) as error:
                if attempt == self._retries:
                    raise _failed(
                        f"{self._url} failed {attempt + 1} times, last with {self._told(error)}",
                        samples,
                        "reward_failed",
                    ) from error
                time.sleep(RETRY_S * 2**attempt)
        found = body.get("rewards") if isinstance(body, Mapping) else None
        return read_scores(found, samples, self._url)

    async def _ask(self, columns: Mapping[str, Any]) -> Any:
        """Ask once, within the time limit from the connection to the answer's last byte."""
        async with (
            asyncio.timeout(self._timeout_s),
            httpx.AsyncClient(timeout=None, verify=self._tls) as client,
        ):
            response = await client.post(self._url, json=columns)
        response.raise_for_status()
        return response.json()

    def _told(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no whole answer within timeout_s ({self._timeout_s:g} s)"
        return f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Nothing to give back: every call has a connection of its own."""


def make_source(
    settings: PpoRewardSettings, roles: ActorCritic, normalizer: Normalizer | None, base: Base
) -> RewardSource:
    """Open the source that the settings name; `normalizer` is the reward model's."""
    if settings.grader is not None:  # which may score by the model too
        from rlhf.graders import GraderReward

        return GraderReward(settings.grader, roles, normalizer, base)
    if settings.function is not None:
        return FunctionReward(settings.function, settings.timeout_s)
    if settings.url is not None:
        return UrlReward(settings.url, settings.timeout_s, settings.retries)
    if normalizer is None:
        raise ConfigError(["reward names no source"])
    return ModelReward(roles, normalizer)


def as_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return samples as TRL hands them to reward functions."""
    columns: dict[str, list[Any]] = {
        "prompts": [sample.prompt.text for sample in samples],
        "completions": [sample.text for sample in samples],
    }
    names = dict.fromkeys(name for sample in samples for name in sample.prompt.item)
    for name in names:
        columns.setdefault(name, [sample.prompt.item.get(name) for sample in samples])
    return columns


def read_scores(value: Any, samples: Sequence[Sample], source: str) -> list[float]:
    """Check what a source answered; None and what is not finite become NaN.

    Raises:
        TrainingFailed: It is not one number a sample.
    """
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or len(value) != len(samples):
        got = f"{len(value)} values" if good else type(value).__name__
        raise _failed(
            f"{source} answered {got} for {len(samples)} completions; return a list of one number "
            "each",
            samples,
            "reward_wrong_shape",
        )
    scores = []
    for sample, reward in zip(samples, value, strict=True):
        if reward is None:
            scores.append(float("nan"))
        elif isinstance(reward, int | float):
            scores.append(float(reward) if abs(reward) < float("inf") else float("nan"))
        else:
            raise _failed(f"{source} answered {reward!r}", [sample], "reward_not_a_number")
    return scores


def without_numbers(settings: PpoRewardSettings, samples: Sequence[Sample]) -> TrainingFailed:
    """Return the error of a batch for which no response has a reward that is a finite number."""
    return _failed(
        f"{settings.source_name} gave no finite number for any of {len(samples)} responses of this "
        "process (None, NaN and infinity count as none); have it return a number for each",
        samples,
        "reward_not_finite",
    )


def by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put indices of rows of similar length together, up to `max_tokens` with padding; one at
    least. Of all cuts into so few parts it is the one whose largest part is smallest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = _cut(order, lengths, max_tokens)
    low, high = 0, max_tokens  # too little, enough
    while high - low > 1:
        middle = (low + high) // 2
        if len(_cut(order, lengths, middle)) == len(parts):
            high = middle
        else:
            low = middle
    return _cut(order, lengths, high)


def _cut(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for index in order:
        if parts and (len(parts[-1]) + 1) * lengths[index] <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _failed(what: str, samples: Sequence[Sample], code: str) -> TrainingFailed:
    lines = name_lines([sample.prompt.line for sample in samples])
    first = samples[0].prompt.text[:SHOWN]
    return TrainingFailed(f"The reward failed: {what}. Prompts: {lines}, {first!r} ...", code=code)
