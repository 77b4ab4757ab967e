"""Official clients in environments of their own, kept in .cache/clients for the next run.

A client is a script of tests/clients that knows the server's address and a key, nothing of hone,
and prints a JSON object in its last line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "clients"
SCRIPTS = Path(__file__).parent / "clients"
CONSTRAINTS = ROOT / "constraints.txt"
INSTALL_LIMIT_S = 900


def python_env(name: str, *requirements: str, constrained: bool = False) -> Path:
    """Return the interpreter of an environment with these packages installed.

    Args:
        constrained: Install the versions that hone is tested with, where both need a package.
    """
    folder = CACHE / name
    python = folder / "bin" / "python"
    pinned = ("-c", str(CONSTRAINTS)) if constrained else ()
    if not _is_ready(folder, requirements):
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q", *pinned, *requirements]
        subprocess.run(install, check=True, timeout=INSTALL_LIMIT_S)
        _set_ready(folder, requirements)
    return python


def node_env(name: str, *packages: str) -> Path:
    """Return a folder below which Node finds these packages.

    Raises:
        FileNotFoundError: Node or npm is not installed.
    """
    folder = CACHE / name
    if not _is_ready(folder, packages):
        folder.mkdir(parents=True)
        install = ["npm", "install", "--silent", "--no-save", "--prefix", folder, *packages]
        subprocess.run(install, check=True, timeout=INSTALL_LIMIT_S)
        _set_ready(folder, packages)
    return folder


def run_client(command: Sequence[str | Path], timeout_s: float = 300) -> dict[str, Any]:
    """Run a client; returns what it told in its last line.

    Raises:
        AssertionError: It failed; with what it printed.
    """
    kept = ("PATH", "HOME", "LANG", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=timeout_s, env=environment
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _is_ready(folder: Path, wanted: Sequence[str]) -> bool:
    """Tell whether the environment is whole; what is not is removed."""
    mark = folder / "ready"
    if mark.exists() and mark.read_text() == "\n".join(wanted):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _set_ready(folder: Path, wanted: Sequence[str]) -> None:
    (folder / "ready").write_text("\n".join(wanted))
