"""`hone doctor`: what this machine has, and what would stop hone from working on it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import typer

from data.errors import ToolkitError
from serve.commands.common import AsJson, clock, print_json, print_table

if TYPE_CHECKING:
    from data.db_state import DatabaseState
    from data.settings import Settings

FREE_DISK_GB = 2  # a base model, its source and a few checkpoints


class Finding(NamedTuple):
    """One thing looked at: whether it is well, and what was seen or what to do."""

    check: str
    ok: bool
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Check Python, libraries, settings, disk, database, worker, base model; changes nothing."""
    from data.settings import load_settings

    findings = [_python(), _torch(), _kernels()]
    try:
        settings = load_settings()
    except ToolkitError as error:
        findings.append(Finding("settings", False, str(error)))
    else:
        findings += _deployment(settings)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        rows = [("ok" if f.ok else "BAD", f.check, f.detail) for f in findings]
        print_table(("", "check", "found"), rows)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _python() -> Finding:
    return Finding("python", sys.version_info >= (3, 11), platform.python_version())


def _torch() -> Finding:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads"
    return Finding("torch", True, f"{torch.__version__} on {where}")


def _kernels() -> Finding:
    from serve.engine import kernels

    return Finding("CPU kernels", True, kernels.outlook())


def _deployment(settings: Settings) -> Iterator[Finding]:
    checks: dict[str, Callable[[Settings], Finding]] = {
        "disk": _disk,
        "database": _database,
        "migrations": _migrations,
        "worker": _worker,
        "base model": _base_model,
        "port": _port,
    }
    for name, check in checks.items():
        try:
            yield check(settings)
        except (ToolkitError, OSError) as error:
            yield Finding(name, False, str(error))


def _disk(settings: Settings) -> Finding:
    home = settings.home.resolve()
    there = next(path for path in (home, *home.parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    detail = f"{free_gb:.0f} GB free at {home}"
    if not os.access(there, os.W_OK):
        return Finding("disk", False, f"{there} cannot be written to")
    if free_gb < FREE_DISK_GB:
        return Finding("disk", False, f"{detail}; hone wants {FREE_DISK_GB} GB")
    return Finding("disk", True, detail)


def _database(settings: Settings) -> Finding:
    from sqlalchemy import make_url

    state = _state(settings)
    shown = make_url(settings.effective_database_url).render_as_string(hide_password=True)
    return Finding(
        "database", True, shown if state.exists else f"{shown}: the first start makes it"
    )


def _migrations(settings: Settings) -> Finding:
    state = _state(settings)
    if state.revision == state.newest:
        return Finding("migrations", True, f"current ({state.newest})")
    if not state.known:
        detail = f"the schema ({state.revision}) is of a newer hone than this ({state.newest})"
        return Finding("migrations", False, detail)
    if state.revision is None:
        return Finding("migrations", True, f"none yet; the next start makes {state.newest}")
    detail = f"at {state.revision}; the next start of `hone serve` brings it to {state.newest}"
    return Finding("migrations", False, detail)


def _worker(settings: Settings) -> Finding:
    from data import presence

    state, alive = _state(settings), presence.alive(settings.workers_dir)
    if alive:
        shown = ", ".join(f"process {worker.pid} since {clock(worker.since)}" for worker in alive)
        return Finding("worker", True, f"alive: {shown}")
    if state.held:
        return Finding("worker", True, f"none here; {state.held} jobs are held by one elsewhere")
    if state.waiting:
        detail = (
            f"none, and {state.waiting} jobs wait; start `hone serve` or `python -m train.worker`"
        )
        return Finding("worker", False, detail)
    return Finding("worker", True, "none runs, and no job waits; `hone serve` starts one")


def _state(settings: Settings) -> DatabaseState:
    from data import db_state

    return db_state.look(settings.effective_database_url)


def _base_model(settings: Settings) -> Finding:
    from serve.engine import base_model

    spec = base_model.find_spec(settings.model)
    folder = base_model.cached(spec, settings.models_dir)
    if folder is None:
        return Finding(
            "base model", True, f"{settings.model}: not fetched yet (`hone models pull`)"
        )
    return Finding("base model", True, f"{settings.model} at {folder}")


def _port(settings: Settings) -> Finding:
    import socket

    with socket.socket() as probe:
        busy = probe.connect_ex((settings.host, settings.port)) == 0
    detail = "in use (by a running server?)" if busy else "free"
    return Finding("port", True, f"{settings.host}:{settings.port} is {detail}")
