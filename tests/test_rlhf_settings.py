"""Settings of `rlhf` that would do nothing are refused, and the message says why."""

from __future__ import annotations

from typing import Any

import pytest

from data.errors import ConfigError
from data.settings import read_config
from rlhf.config import DpoConfig, GrpoConfig, KtoConfig, PpoConfig, RewardConfig, RlooConfig

FUNCTION = {"reward.function": "m:f"}
JUDGED = {"reward.model": "runs/reward/adapter"}


def read(kind: type[Any], values: dict[str, object]) -> Any:
    given: dict[str, object] = {"output_dir": "out"}
    sampled = hasattr(kind, "stop_at_eos") or kind is PpoConfig
    given |= {"prompts_file": "p.jsonl"} if sampled else {"train_file": "t.jsonl"}
    return read_config(kind, None, [f"{name}={value}" for name, value in (given | values).items()])


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        (PpoConfig, JUDGED | {"value.start": "reward", "value.trunk": "shared"}, "value.trunk is"),
        (PpoConfig, FUNCTION | {"gold.function": "m:g", "gold.clip": 1}, "gold.clip does nothing"),
        (
            PpoConfig,
            FUNCTION | {"gold.function": "m:g", "gold.missing_eos_penalty": 0},
            "gold.missing_eos_penalty does nothing",
        ),
        (
            PpoConfig,
            FUNCTION | {"gold.function": "m:g", "gold.whiten": "true"},
            "gold.whiten does nothing",
        ),
        (PpoConfig, FUNCTION | {"kl.coef": 0, "kl.target": 5}, "coef is 0"),
        (PpoConfig, FUNCTION | {"kl.horizon": 50}, "give target too"),
        (PpoConfig, FUNCTION | {"reward.retries": 1}, "retries is of url alone"),
        (PpoConfig, JUDGED | {"reward.timeout_s": 1}, "timeout_s is of function and url alone"),
        (PpoConfig, FUNCTION | {"reward.clip": 0}, "above 0, null or auto"),
        (RlooConfig, FUNCTION | {"reward.whiten": "true"}, "reward.whiten scales PPO's"),
        (GrpoConfig, FUNCTION | {"reward.whiten": "true"}, "reward.whiten scales PPO's"),
        (RlooConfig, FUNCTION | {"n_evals": 2}, 'unknown key "n_evals"'),
        (GrpoConfig, FUNCTION | {"n_evals": 2}, 'unknown key "n_evals"'),
        *(
            (kind, {"validation_file": "v.jsonl", "validation_fraction": 0.2}, "exclude each other")
            for kind in (RewardConfig, DpoConfig, KtoConfig)
        ),
    ],
)
def test_what_would_do_nothing_is_refused(
    kind: type[Any], values: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(kind, values)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (FUNCTION, float("inf")),
        (JUDGED, 5.0),
        (FUNCTION | {"reward.clip": 3}, 3.0),
        (JUDGED | {"reward.clip": "null"}, float("inf")),
    ],
)
def test_only_scores_of_a_reward_model_are_cut_unless_told(
    values: dict[str, object], limit: float
) -> None:
    for kind in (PpoConfig, RlooConfig, GrpoConfig):
        assert read(kind, values).reward.limit == limit
