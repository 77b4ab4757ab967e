"""A PostgreSQL server of the tests' own: Debian's binaries, a temporary folder, a socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

USERS = ("postgres", "nobody")  # the server refuses to run as root


def find_binaries() -> Path | None:
    """Return the folder of the newest installed server, or None."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: p.parts[-3])
    return versions[-1].parent if versions else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server until the block ends; yields the URL of its first database."""
    binaries = find_binaries()
    if binaries is None:
        pytest.fail("PostgreSQL is not installed; Debian: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="hone-pg-") as name:
        home = Path(name)
        become: list[str] = []
        if os.geteuid() == 0:
            user = next(user for user in USERS if _exists(user))
            shutil.chown(home, user)
            become = ["runuser", "-u", user, "--"]
        initdb = [binaries / "initdb", "-D", home / "data", "-U", "hone", "-A", "trust", "-N"]
        subprocess.run([*become, *initdb, "-E", "UTF8"], check=True, stdout=subprocess.DEVNULL)
        control = [*become, binaries / "pg_ctl", "-D", home / "data", "-w", "-l", home / "log"]
        options = f"-c listen_addresses='' -k {home} -c fsync=off -c max_connections=200"
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql+psycopg://hone@/postgres?host={home}"
        finally:
            subprocess.run(
                [*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL
            )


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """Make a database of its own; yields its URL."""
    name = f"test_{uuid.uuid4().hex}"
    plain = server_url.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"create database {name}")  # type: ignore[call-overload]
    yield server_url.replace("/postgres?", f"/{name}?")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")  # type: ignore[call-overload]


def _exists(user: str) -> bool:
    return subprocess.run(["id", user], capture_output=True, check=False).returncode == 0
