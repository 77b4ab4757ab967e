"""`python -m train.worker [--home DIR] [--once] [key=value ...]`: does the jobs of a deployment.

One lane validates files, `job_concurrency` lanes train, so a bad file is told while others train.
Any number of workers may share a database: a job is claimed by one, and taken over when that one
falls silent. SIGTERM stops the trainers and gives their jobs back; they go on at the next start.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import adapter_folders, job_lease, presence, webhooks
from data.db import Database
from data.errors import StateConflict, ToolkitError
from data.feedback import privacy
from data.files import FileStore
from data.settings import Settings, load_settings
from data.tables import Job, new_id
from data.uploads import UploadStore
from train.job_training import DATABASE_AWAY, fail_job, train_job
from train.job_validation import validate_job
from train.lease import Lease
from train.run import is_disk_full
from train.workshop import Workshop

POLL_S = 0.5
AFTER_ERROR_S = 5.0
SWEEP_EVERY_S = 3600.0
MIB = 1 << 20
Handler = Callable[[Workshop, Job, Lease], None]
STAGES: dict[str, tuple[tuple[str, ...], Handler]] = {
    "validate": (("validating_files",), validate_job),
    "train": (("queued", "running"), train_job),
}

QUIET = ("httpx", "httpcore")  # they tell URLs, which may hold secrets
log = logging.getLogger("hone.worker")


class Worker:
    """Claims and does jobs until told to stop."""

    def __init__(self, shop: Workshop):
        self._shop = shop

    def run(self, once: bool = False) -> None:
        """Work until `stopping` is set; with `once`, until nothing can be claimed."""
        names = ["validate", *["train"] * self._shop.settings.job_concurrency]
        if once:
            self._lane("validate", once)
            names.remove("validate")
        lanes = [
            threading.Thread(target=self._lane, args=(name, once), name=f"{name} {number}")
            for number, name in enumerate(names)
        ]
        for lane in lanes:
            lane.start()
        next_sweep = time.monotonic()
        while any(lane.is_alive() for lane in lanes):
            if time.monotonic() >= next_sweep:
                self._sweep()
                next_sweep += SWEEP_EVERY_S
            time.sleep(POLL_S / 5)  # not Event.wait: a signal handler sets the event
        for lane in lanes:
            lane.join()

    def _lane(self, name: str, once: bool) -> None:
        stopping = self._shop.stopping
        while not stopping.is_set():
            try:
                found = self._work(name)
            except Exception:
                log.exception("a job could not be worked on; trying again")
                stopping.wait(AFTER_ERROR_S)
                continue
            if not found:
                if once:
                    return
                stopping.wait(POLL_S)

    def _work(self, name: str) -> bool:
        """Claim one job and do what it is due for; False if there was none."""
        shop, settings = self._shop, self._shop.settings
        states, handler = STAGES[name]
        job = job_lease.claim(shop.database, shop.worker_id, settings.lease_s, states)
        if job is None:
            return False
        with Lease(
            shop.database, job.id, shop.worker_id, settings.lease_s, settings.heartbeat_s
        ) as lease:
            try:
                handler(shop, job, lease)
            except StateConflict as error:
                log.warning("%s: left alone: %s", job.id, error)
            except Exception as error:
                if isinstance(error, DATABASE_AWAY) and not is_disk_full(error, settings.home):
                    raise  # the job is claimed again when its lease has run out
                if isinstance(error, ToolkitError):
                    log.warning("%s failed: %s", job.id, error.code)  # the message may quote a row
                else:
                    log.exception("%s failed", job.id)
                fail_job(shop, job, lease, error)
        shop.forget_bulk([job.id])
        return True

    def _sweep(self) -> None:
        try:
            removed = [*self._shop.files.sweep()]
            UploadStore(self._shop.database, self._shop.files).sweep()
            privacy.expire(self._shop.database)
            webhooks.sweep(self._shop.database)
            removed += adapter_folders.sweep(self._shop.database, self._shop.settings.adapters_dir)
            runs = self._shop.settings.runs_dir
            self._shop.forget_bulk([path.name for path in runs.glob("*")])
        except Exception:  # a database that is away for a moment, say: jobs go on
            log.exception("what crashes left behind could not be removed")
        else:
            if removed:
                log.info("removed %d files that nothing names", len(removed))


def open_workshop(settings: Settings) -> Workshop:
    """Open what a worker with these settings needs."""
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.effective_database_url)
    database.migrate()
    return Workshop(
        settings=settings,
        database=database,
        files=FileStore(database, settings.effective_blob_url, settings.max_upload_mb * MIB),
        worker_id=f"{socket.gethostname()[:24]}:{os.getpid()}:{new_id('', 8)}",
        base_fingerprint=lambda model: _fingerprint(settings, model),
        base_tokenizer=functools.cache(lambda model: _tokenizer(settings, model)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    words = [*options.words, *([f"home={options.home}"] if options.home else [])]
    try:
        settings = load_settings(options.config, words)
        _set_up_logging(settings.log_level)
        shop = open_workshop(settings)
    except ToolkitError as error:
        print(f"train.worker: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shop.stopping.set())
    log.info("worker %s serves %s", shop.worker_id, settings.home.resolve())
    try:
        with presence.announced(settings.workers_dir, shop.worker_id):
            Worker(shop).run(options.once)
    finally:
        shop.database.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.worker", description="Do the jobs.")
    parser.add_argument("words", nargs="*", metavar="key=value", help="override settings")
    parser.add_argument("--config", type=Path, help="YAML with settings; see configs/serve")
    parser.add_argument("--home", type=Path, help="folder of database, files and runs")
    parser.add_argument("--once", action="store_true", help="stop when no job is left")
    return parser


def _set_up_logging(level: str) -> None:
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False)
        pattern = "%(message)s"
    else:
        handler = logging.StreamHandler()
        pattern = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level.upper(), format=pattern, handlers=[handler])
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _fingerprint(settings: Settings, model: str) -> str:
    from serve.engine import base_model  # torch: only once there is a job

    return base_model.fingerprint(_fetched(settings, model))


def _tokenizer(settings: Settings, model: str) -> Any:
    from serve.engine import base_model

    return base_model.load_tokenizer(_fetched(settings, model))


def _fetched(settings: Settings, model: str) -> Path:
    from serve.engine import base_model

    served = base_model.find_spec(settings.model)
    spec = served if served.name == model else base_model.find_spec(model)
    return base_model.fetch(spec, settings.models_dir)


if __name__ == "__main__":
    sys.exit(main())
