"""Run configurations: what is refused, all at once, and what `auto` becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data import job_start
from data.errors import ConfigError, InvalidInput
from data.job_sections import SECTIONS
from data.job_spec import JobSpec
from data.settings import read_config
from train.config import Plan, SftConfig, resolve, resolve_length

ROOT = Path(__file__).parents[1]
NEEDED = ["train_file=a.jsonl", "output_dir=run"]


def plan(num_rows: int, *words: str, parameters: int = 135_000_000, processes: int = 1) -> Plan:
    return resolve(
        read_config(SftConfig, None, [*NEEDED, *words]),
        num_rows=num_rows,
        max_length=64,
        num_parameters=parameters,
        num_processes=processes,
    )


def problems(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(SftConfig, None, [*NEEDED, *words])
    return str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sft").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configs_are_valid_and_name_their_command(path: Path) -> None:
    config = read_config(SftConfig, path)
    assert yaml.safe_load(path.read_text("utf-8"))["output_dir"] == str(config.output_dir)
    assert f"--config configs/sft/{path.name}" in path.read_text("utf-8")


def test_unknown_keys_are_told_with_the_nearest_name_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train_file: a.jsonl\noutput_dir: run\nlora:\n  rank: 4\nnum_epohcs: 3\n")
    with pytest.raises(ConfigError) as caught:
        read_config(SftConfig, path)
    text = str(caught.value)
    assert f'{path}:5: unknown key "num_epohcs"; did you mean "num_epochs"?' in text
    assert f'{path}:4: unknown key "lora.rank"' in text


@pytest.mark.parametrize("name", SECTIONS["lora"])
def test_a_job_that_goes_on_may_set_what_its_trainer_takes(name: str) -> None:
    """What is queued is not refused by the trainer later, and what it takes is queued."""
    value: Any = {"target_modules": ["q_proj"], "use_rslora": True, "dropout": 0.1}.get(name, 2)
    refused = []
    try:
        read_config(SftConfig, None, [*NEEDED, "start_adapter=a", f"lora.{name}={value}"])
    except ConfigError:
        refused.append("by the trainer")
    try:
        job_start._check_shape(JobSpec("model", "file-1", options={"lora": {name: value}}))
    except InvalidInput:
        refused.append("when it is made")
    assert len(refused) != 1, refused


def test_impossible_combinations_are_told_all_at_once() -> None:
    text = problems(
        "validation_file=v.jsonl",
        "validation_fraction=0.1",
        "batch_size=4",
        "micro_batch_size=8",
        "num_epochs=99",
        "learning_rate=-1",
    )
    for part in (
        "validation_file and validation_fraction exclude each other",
        "micro_batch_size 8 is more than batch_size 4",
        "num_epochs is 99; expected 1 to 50, or auto",
        "learning_rate is -1.0; expected a number above 0, or auto",
    ):
        assert part in text


def test_what_needs_validation_rows_says_so() -> None:
    text = problems("early_stopping.enabled=true", "n_evals=3")
    assert "early_stopping needs validation_file or validation_fraction" in text
    assert "n_evals needs validation_file or validation_fraction" in text


@pytest.mark.parametrize(
    ("num_rows", "epochs", "batch"),
    [
        (10, 10, 8),
        (99, 10, 8),
        (240, 8, 8),
        (1000, 5, 8),
        (9992, 3, 8),
        (20_000, 2, 16),
        (50_000, 1, 16),
        (200_000, 1, 32),
    ],
)
def test_auto_follows_the_number_of_rows(num_rows: int, epochs: int, batch: int) -> None:
    found = plan(num_rows)
    assert (found.num_epochs, found.batch_size) == (epochs, batch)
    assert found.steps_per_epoch == -(-num_rows // batch)
    assert found.total_steps == epochs * found.steps_per_epoch


def test_auto_rate_falls_with_the_models_size() -> None:
    rates = [plan(100, parameters=n).learning_rate for n in (135e6, 1e9, 7e9)]  # type: ignore[arg-type]
    assert rates == [1e-3, 5e-4, 2e-4]


def test_auto_rank_grows_with_the_rows() -> None:
    assert [plan(n).lora_r for n in (10, 19_999, 20_000, 100_000)] == [16, 16, 32, 64]
    assert plan(200_000, "start_adapter=a").lora_r is None
    assert plan(200_000, "max_auto_rank=24").lora_r == 24


def test_what_is_given_is_kept() -> None:
    assert plan(200_000, "lora.r=4").lora_r == 4
    found = plan(100, "num_epochs=1", "batch_size=4", "learning_rate=0.5", "micro_batch_size=2")
    assert (found.num_epochs, found.batch_size, found.learning_rate) == (1, 4, 0.5)
    assert found.micro_batch_size == 2


def test_processes_share_a_step_evenly() -> None:
    assert plan(100, processes=4).micro_batch_size == 2
    sizes = [plan(100, processes=n).batch_size for n in (1, 2, 3, 5, 6, 7, 16)]
    assert sizes == [8, 8, 9, 10, 12, 14, 16]
    with pytest.raises(ConfigError, match="give a multiple of 3"):
        plan(100, "batch_size=8", processes=3)


def test_length_is_the_longest_rows_within_the_context() -> None:
    config = read_config(SftConfig, None, NEEDED)
    assert resolve_length(config, 30, 100) == 30
    assert resolve_length(config, 300, 100) == 100
    longer = read_config(SftConfig, None, [*NEEDED, "max_length=200"])
    with pytest.raises(ConfigError, match=r"max_length is 200, but .* at most 100 tokens"):
        resolve_length(longer, 30, 100)


def test_a_config_cannot_be_changed() -> None:
    config = read_config(SftConfig, None, NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
