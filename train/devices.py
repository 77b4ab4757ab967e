"""Which GPU a process trains on, settled before torch looks for one."""

from __future__ import annotations

import os
from typing import TypeVar

from data.errors import ConfigError
from train.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
Config = TypeVar("Config", bound=RunConfig)


def with_one_gpu(config: Config) -> Config:
    """Let a run of one process see one GPU: the first, or N of `device=cuda:N`.

    transformers would spread each batch over all GPUs that it sees, and takes the first for the
    model whatever was asked for. Of several processes each has the GPU of its rank
    (`serve.engine.base_model.resolve_device`).

    Raises:
        ConfigError: `device` names a GPU that the process cannot see, or one for all processes.
    """
    kind, _, number = config.device.partition(":")
    if kind not in ("auto", "cuda"):
        return config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if number:
            raise ConfigError(
                [f"device is {config.device}, but each process has a GPU of its own: give cuda"]
            )
        return config
    seen = os.environ.get(VISIBLE)
    names = None if seen is None else [name for name in seen.split(",") if name]
    index = int(number or 0)
    if names is not None and index >= len(names):
        if kind == "auto":
            return config  # none is to be used
        raise ConfigError([f"device is {config.device}, but {VISIBLE} is {seen!r}"])
    os.environ[VISIBLE] = str(index) if names is None else names[index]
    return config.model_copy(update={"device": "cuda"}) if number else config


def refuse_shards() -> None:
    """Refuse to train with the base's weights shared out among processes.

    Each process loads the whole base, and what follows the last step (saving, checks, report) reads
    weights in the main process alone, which would wait for the others for ever.

    Raises:
        ConfigError: accelerate was told to use FSDP or ZeRO-3.
    """
    environment = os.environ
    fsdp = environment.get("ACCELERATE_USE_FSDP") == "true"
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if fsdp or (deepspeed and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"):
        raise ConfigError(
            [
                f"{'FSDP' if fsdp else 'ZeRO-3'} is as yet for --dry-run only: an adapter cannot "
                "be saved from a base that is shared out. Take "
                "configs/accelerate/multi_gpu.yaml, with load_in_4bit=true or "
                "gradient_checkpointing=true where the base is too large for one GPU"
            ]
        )
