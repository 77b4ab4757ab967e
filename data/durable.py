"""Having files on disk, whatever becomes of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have what was written into a file on disk; of a folder, what was renamed inside it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Have all files of a folder on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
