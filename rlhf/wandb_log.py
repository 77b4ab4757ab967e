"""Logging to Weights & Biases, if a project is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.errors import ConfigError
from train.config import WandbSettings
from train.run import RunFolder


class WandbLog:
    """A run at Weights & Biases; does nothing unless a project is named."""

    def __init__(self, settings: WandbSettings, run: RunFolder, is_main: bool):
        self._run: Any = None
        if not (settings.project and is_main):
            return
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                ["wandb.project is set, but wandb is not installed; run: pip install wandb"]
            ) from error
        name = settings.name or run.path.name
        self._run = wandb.init(project=settings.project, name=name, dir=str(run.path))

    def write(self, record: Mapping[str, Any]) -> None:
        """Log an update's numbers."""
        if self._run is not None:
            self._run.log(dict(record), step=int(record["step"]))

    def close(self) -> None:
        """End the run there."""
        if self._run is not None:
            self._run.finish()
