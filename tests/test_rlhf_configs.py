"""The shipped configurations of `rlhf` and of accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from data.settings import read_config
from rlhf.config import DpoConfig, GrpoConfig, KtoConfig, PpoConfig, RewardConfig, RlooConfig

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
