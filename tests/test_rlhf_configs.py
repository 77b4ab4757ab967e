"""The shipped configurations of `rlhf` and of accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from data.settings import Settings, read_config
from rlhf.config import RewardConfig
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_math import AdaptiveKL
from rlhf.reward_settings import PpoRewardSettings
from rlhf.trl_config import DpoConfig, GrpoConfig, KtoConfig, RlooConfig
from train.job_method_config import write_method_config
from train.run import RunFolder

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "rloo": RlooConfig,
    "grpo": GrpoConfig,
}
FILES = sorted(path for kind in KINDS for path in (ROOT / "configs" / kind).glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_are_valid_and_name_their_command(path: Path) -> None:
    config = read_config(KINDS[path.parent.name], path)
    text = path.read_text()
    assert f"-m rlhf.{path.parent.name}" in text
    assert f"configs/{path.parent.name}/{path.name}" in text
    for name in ("train_file", "prompts_file"):
        if hasattr(config, name):
            assert (ROOT / getattr(config, name)).is_file()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerates_configs_parse(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.machine_rank == 0
    if "fsdp" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
    if "deepspeed" in path.stem:
        assert config.deepspeed_config["zero_stage"] == 3


def test_the_example_of_ppo_steers_its_coefficient_within_its_run() -> None:
    """A KL that stays far above or below the target moves it several times up or down."""
    config = read_config(PpoConfig, ROOT / "configs/ppo/helpful.yaml")
    for kl, low, high in ((100.0, 3, 20), (0.01, 1 / 20, 1 / 3)):
        controller = AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)
        for _ in range(config.num_updates):
            controller.update(kl, config.batch_size)
        assert low < controller.coef / config.kl.coef < high


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_a_jobs_multiplier_scales_the_rates_of_policy_and_value(
    tmp_path: Path, multiplier: float
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say"}\n' * 64)
    grader = {"type": "string_check", "name": "a", "input": "{{ sample.output_text }}"}
    grader |= {"reference": "a", "operation": "eq"}
    job: Any = SimpleNamespace(
        method={"type": "ppo", "ppo": {"grader": grader}},
        hyperparameters={"learning_rate_multiplier": multiplier},
        options={},
        integrations=(),
        base="smollm2-135m-instruct",
        seed=3,
    )
    path = write_method_config(
        *(job, Settings(home=tmp_path), RunFolder(tmp_path), prompts, None, None, None)
    )
    found = read_config(PpoConfig, path)
    plain = PpoConfig(
        prompts_file=prompts, output_dir=tmp_path, reward=PpoRewardSettings(function="m:f")
    )
    assert found.learning_rate == pytest.approx(multiplier * plain.learning_rate)
    assert found.value.learning_rate == pytest.approx(multiplier * plain.value.learning_rate)


def test_a_job_shows_the_batch_of_whole_groups_that_it_trains_with(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say"}\n' * 64)
    grader = {"type": "string_check", "name": "a", "input": "{{ sample.output_text }}"}
    grader |= {"reference": "a", "operation": "eq"}
    job: Any = SimpleNamespace(
        method={"type": "reinforcement", "reinforcement": {"grader": grader}},
        hyperparameters={"compute_multiplier": 2.5, "batch_size": 32},
        options={},
        integrations=(),
        base="smollm2-135m-instruct",
        seed=3,
    )
    run = RunFolder(tmp_path)
    found = read_config(
        GrpoConfig,
        write_method_config(job, Settings(home=tmp_path), run, prompts, None, None, None),
    )
    assert (found.num_generations, found.batch_size) == (10, 30)
    assert json.loads(run.hyperparameters.read_text())["batch_size"] == 30
