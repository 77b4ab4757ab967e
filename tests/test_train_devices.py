"""Which GPU a training process takes; no GPU is needed to tell."""

from __future__ import annotations

import os

import pytest
import torch

from data.errors import ConfigError
from serve.engine.base_model import resolve_device
from train import sft
from train.config import RunConfig
from train.devices import with_one_gpu


@pytest.mark.parametrize(
    ("device", "seen", "left", "visible"),
    [
        ("cpu", None, "cpu", None),
        ("auto", None, "auto", "0"),
        ("cuda", "5,7", "cuda", "5"),
        ("cuda:1", "5,7", "cuda", "7"),
        ("cuda:3", None, "cuda", "3"),
        ("auto", "", "auto", ""),  # hidden on purpose
    ],
)
def test_a_process_alone_sees_one_gpu(monkeypatch, device, seen, left, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    config = with_one_gpu(RunConfig(base_model="b", output_dir="o", device=device))
    assert (config.device, os.environ.get("CUDA_VISIBLE_DEVICES")) == (left, visible)


def test_a_gpu_that_is_not_seen_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match="device is cuda:1, but CUDA_VISIBLE_DEVICES is '4'"):
        with_one_gpu(RunConfig(base_model="b", output_dir="o", device="cuda:1"))


def test_processes_that_train_together_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cpu") == torch.device("cpu")
    assert with_one_gpu(RunConfig(base_model="b", output_dir="o")).device == "auto"
    with pytest.raises(ConfigError, match="each process has a GPU of its own"):
        with_one_gpu(RunConfig(base_model="b", output_dir="o", device="cuda:0"))


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
)
def test_a_base_that_is_shared_out_is_refused_before_anything_is_trained(
    monkeypatch, capsys, environment
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sft.main(["base_model=b", "output_dir=o", "train_file=t"]) == 2
    assert "is as yet for --dry-run only" in capsys.readouterr().err
