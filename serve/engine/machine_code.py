"""C that the machine's compiler turns into code for this very processor: compiled once and kept.

A source is a file and the folders of its headers; the library's name says what went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=gnu11", "-shared", "-fPIC", "-pthread"),
)
COMPILE_TIMEOUT_S = 120

log = logging.getLogger(__name__)


def load(source: Path, otherwise: str, headers: Sequence[Path] = ()) -> ctypes.CDLL | None:
    """Return the library of a source, built if need be; None where it cannot be had.

    Args:
        otherwise: What is done without it, for the log.
        headers: Folders of headers, beside the source's own.
    """
    compiler = find_compiler()
    if compiler is None:
        log.info("no C compiler (%s): %s", ", ".join(COMPILERS), otherwise)
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, source, headers)))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("%s: %s could not be built: %s", otherwise, source, told)
        return None


def find_compiler() -> str | None:
    """Return the path of a C compiler, if there is one."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def outlook(source: Path, otherwise: str) -> str:
    """Say whether there is or will be a library, without building it."""
    compiler = find_compiler()
    if compiler is None:
        return f"no C compiler: {otherwise}"
    try:
        if _target(compiler, source, ()).exists():
            return "compiled for this processor"
        command = [compiler, *FLAGS, "-fsyntax-only", str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return f"{compiler} does not work: {otherwise}"
    return "compiled at the first start"


def _compiled(compiler: str, source: Path, headers: Sequence[Path]) -> Path:
    """Return the shared library for this source, compiler and processor, built if need be."""
    target = _target(compiler, source, headers)
    if not target.exists():
        folder = target.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=target.name)
        os.close(handle)
        try:
            subprocess.run(
                [
                    *(compiler, *FLAGS, *(f"-I{folder}" for folder in headers)),
                    *("-o", temporary, str(source), "-lm"),
                ],
                check=True,
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            Path(temporary).replace(target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return target


def _target(compiler: str, source: Path, headers: Sequence[Path]) -> Path:
    """Name the shared library after everything that decides what is in it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    files = [path for folder in (source.parent, *headers) for path in sorted(folder.iterdir())]
    sources = [path.read_bytes() for path in files if path.is_file()]
    identity = repr((sources, version, FLAGS, _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hone"
    return folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    """Return what decides which instructions `-march=native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
