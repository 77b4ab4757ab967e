"""A worker in a process of its own, with the fake trainer, that can kill itself at a given moment.

    python tests/fake_worker.py HOME [--once]

The environment variable DIE_AT names the moment; see MOMENTS.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_trainer

from data import adapter_folders, job_lease, jobs, registry
from data.files import FileStore
from data.settings import Settings
from train import job_training, job_validation, worker
from train.workshop import Workshop

# What `accelerate launch` is for one process: a parent that dies of SIGTERM at once.
LAUNCHER = """
import subprocess, sys
status = subprocess.Popen(sys.argv[1:]).wait()
if status:
    raise subprocess.CalledProcessError(status, sys.argv[1:])
"""
TRAINER = (sys.executable, "-c", LAUNCHER, sys.executable, str(Path(fake_trainer.__file__)))
# moment: (where the function is looked up, its name, whether it is done before the kill)
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "claimed": (job_lease, "claim", True),
    "validated": (job_validation, "validate", True),
    "queued": (jobs, "enqueue", True),
    "before the trainer": (job_training, "TrainerProcess", False),
    "with the trainer": (job_training, "TrainerProcess", True),
    "training done": (job_training, "publish_outcome", False),
    "table stored": (FileStore, "stage", True),
    "adapter staged": (adapter_folders, "stage", True),
    "rows not committed": (registry, "point_alias", True),
    "succeeded": (job_training, "publish_outcome", True),
}


class ByteTokenizer:
    """Tokens are bytes; quick to load, in processes that live for a moment."""

    all_special_tokens = ("<|end|>",)
    bos_token_id = eos_token_id = 256
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode()


def make_shop(home: Path, **values: Any) -> Workshop:
    """Return a workshop with short times and the fake trainer."""
    defaults = {"lease_s": 1.5, "heartbeat_s": 0.2, "cancel_grace_s": 2.0}
    shop = worker.open_workshop(Settings(home=home, **(defaults | values)))
    return replace(
        shop,
        trainer=TRAINER,
        base_fingerprint=lambda _: fake_trainer.FINGERPRINT,
        base_tokenizer=lambda _: ByteTokenizer(),
    )


def die_at(moment: str) -> None:
    """Make this process kill itself when it gets to a moment."""
    place, name, afterwards = MOMENTS[moment]
    function = getattr(place, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if not afterwards:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if result is not None or name in ("enqueue", "publish_outcome"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, deadly)


def main() -> None:
    if os.environ.get("DIE_AT"):
        die_at(os.environ["DIE_AT"])
    logging.basicConfig(level="INFO")
    shop = make_shop(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: shop.stopping.set())
    worker.Worker(shop).run(once="--once" in sys.argv)


if __name__ == "__main__":
    main()
