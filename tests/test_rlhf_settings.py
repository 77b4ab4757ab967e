"""Settings of `rlhf` that would do nothing are refused, and the message says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from data.errors import ConfigError
from data.settings import read_config
from rlhf.config import RewardConfig
from rlhf.ppo_config import PpoConfig
from rlhf.reward_settings import PpoRewardSettings
from rlhf.trl_config import DpoConfig, GrpoConfig, KtoConfig, RlooConfig

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
        (
            PpoConfig,
            FUNCTION | {"kl.target": 6, "kl.horizon": 128, "batch_size": 640},
            "kl.horizon 128 is at most a fifth of batch_size 640",
        ),
        (
            PpoConfig,
            FUNCTION | {"total_episodes": 128, "value.warmup_updates": 2},
            "leaves no update to the policy",
        ),
        (PpoConfig, FUNCTION | {"reward.retries": 1}, "retries is of url alone"),
        (PpoConfig, JUDGED | {"reward.timeout_s": 1}, "timeout_s is of function and url alone"),
        (PpoConfig, FUNCTION | {"reward.clip": 0}, "above 0, null or auto"),
        (RlooConfig, FUNCTION | {"reward.whiten": "true"}, "reward.whiten scales PPO's"),
        (GrpoConfig, FUNCTION | {"reward.whiten": "true"}, "reward.whiten scales PPO's"),
        (RlooConfig, FUNCTION | {"n_evals": 2}, 'unknown key "n_evals"'),
        (GrpoConfig, FUNCTION | {"n_evals": 2}, 'unknown key "n_evals"'),
        (RewardConfig, {"start_adapter": "a", "lora.r": 4}, "leave out lora.r"),
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
        (
            JUDGED | {"reward.grader": json.dumps({"type": "score_model", "name": "j"})},
            5.0,
        ),
        (
            JUDGED
            | {
                "reward.grader": json.dumps(
                    {
                        "type": "multi",
                        "graders": {"j": {"type": "score_model", "name": "j"}},
                        "calculate_output": "10 * j",
                    }
                )
            },
            float("inf"),
        ),
    ],
)
def test_only_scores_of_a_reward_model_are_cut_unless_told(
    values: dict[str, object], limit: float
) -> None:
    for kind in (PpoConfig, RlooConfig, GrpoConfig):
        assert read(kind, values).reward.limit == limit


CHECK = {"type": "string_check", "input": "{{ sample.output_text }}", "reference": "a"}
CHECK |= {"operation": "eq", "name": "same"}
ALIKE = {"type": "text_similarity", "input": "a", "reference": "b", "evaluation_metric": "bleu"}
JUDGE = {"type": "score_model", "name": "judge"}


def multi(formula: str = "a", **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders, "calculate_output": formula}


def without(grader: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in grader.items() if key != name}


@pytest.mark.parametrize(
    "grader",
    [CHECK, ALIKE, multi(a=CHECK), multi("2 * a + b", a=CHECK, b=ALIKE)],
)
def test_good_graders_are_taken(grader: dict[str, Any]) -> None:
    assert PpoRewardSettings(grader=grader).grader == grader
    judged = {"model": "runs/reward/adapter", "grader": multi("a + b", a=CHECK, b=JUDGE)}
    assert PpoRewardSettings.model_validate(judged)


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        *((without(CHECK, n), f"grader.{n} is missing") for n in ("input", "reference")),
        (without(CHECK, "operation"), "grader.operation is missing"),
        (without(ALIKE, "evaluation_metric"), "grader.evaluation_metric is missing"),
        (CHECK | {"operation": "is"}, "expected one of eq, ne, like, ilike"),
        (CHECK | {"refrence": "a"}, 'unknown key "grader.refrence"; did you mean "reference"?'),
        (CHECK | {"input": "{{ env.HOME }}"}, "grader.input: `{{ env.HOME }}` cannot be filled"),
        (CHECK | {"reference": 5}, "grader.reference is 5; give a text"),
        (ALIKE | {"evaluation_metric": "sine"}, "expected one of"),
        ({"type": "python", "source": "x"}, "grader.type is 'python'"),
        ({"name": "x"}, "grader.type is None"),
        (JUDGE, "set model, as in reward.model"),
        (multi(a=JUDGE), "grader.graders.a is a score_model"),
        (multi() | {"graders": [CHECK]}, "give a mapping of names to graders"),
        (multi(), "give a mapping of names to graders"),
        (without(multi(a=CHECK), "calculate_output"), "grader.calculate_output is missing"),
        (multi("b", a=CHECK), "grader.calculate_output:"),
        (multi("(a", a=CHECK), "grader.calculate_output:"),
        (multi(a=multi(a=CHECK)), "a multi grader cannot hold another"),
        (multi(a="CHECK"), "grader.graders.a is 'CHECK'; give a mapping"),
        (multi(a=without(CHECK, "input")), "grader.graders.a.input is missing"),
        (multi(a=CHECK, b=1), "grader.graders.b is 1"),
    ],
)
def test_bad_graders_are_refused_when_settings_are_read(grader: Any, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PpoRewardSettings(grader=grader)
    assert told in str(caught.value)


def test_every_problem_of_a_grader_is_told_at_once() -> None:
    grader = multi("a + c", a=without(CHECK, "input"), b=ALIKE | {"evaluation_metric": "sine"})
    with pytest.raises(ValidationError) as caught:
        PpoRewardSettings(grader=grader)
    for told in (
        "graders.a.input is missing",
        "graders.b.evaluation_metric is",
        "calculate_output",
    ):
        assert told in str(caught.value)


def test_a_reward_model_that_no_grader_uses_is_refused() -> None:
    with pytest.raises(ValidationError, match="no part of grader is a score_model"):
        PpoRewardSettings.model_validate({"model": "runs/reward/adapter", "grader": CHECK})


@pytest.mark.parametrize(
    ("values", "updates"),
    [
        (FUNCTION, 10),
        (FUNCTION | {"total_episodes": 64 * 50}, 10),
        (FUNCTION | {"total_episodes": 64 * 8}, 1),
        (FUNCTION | {"total_episodes": 64}, 0),
        (FUNCTION | {"value.warmup_updates": 3}, 3),
        (JUDGED, 0),
        (JUDGED | {"value.start": "zero"}, 10),
        (JUDGED | {"reward.grader": json.dumps(JUDGE)}, 0),
        (JUDGED | {"reward.grader": json.dumps(multi("10 * a", a=JUDGE))}, 10),
    ],
)
def test_the_value_learns_alone_for_a_fifth_of_a_run_at_most(
    values: dict[str, object], updates: int
) -> None:
    assert read(PpoConfig, values).value_warmup == updates
