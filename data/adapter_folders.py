"""The folders of adapter versions on disk: staged, checked, read, and swept away.

A folder is copied aside, checked and hashed, and renamed into the adapters folder before its row
is inserted (`registry`). A crash in between leaves a folder without a row, which `sweep` removes; a
row without its folder cannot happen.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import select

from data import bias
from data.adapter_checks import AdapterFacts, check_adapter, digest_of, files_of
from data.db import Database
from data.durable import sync
from data.errors import AdapterRefused, InvalidInput, NotFound
from data.tables import AdapterVersion, new_id, now

STAGING = ".staging-"
VERSION = "advr_"
ORPHAN_AGE_S = 3600.0
GRACE_S = 300  # for requests that were admitted before a version was deleted


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """A checked folder that lies in its final place and waits for its row."""

    id: str
    path: str  # below the adapters folder
    facts: AdapterFacts


def stage(adapters_dir: Path, source: Path, base_fingerprint: str | None) -> StagedAdapter:
    """Copy an adapter folder into the registry's, check and hash it, and rename it into place.

    Raises:
        AdapterRefused: It failed a check; nothing is left behind.
    """
    if not source.is_dir():
        raise AdapterRefused(f"There is no adapter folder {source}", code="adapter_incomplete")
    version_id = new_id(VERSION)
    staging = adapters_dir / f"{STAGING}{version_id}"
    adapters_dir.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, staging)
        os.utime(staging)  # the copy took the source's time, which `sweep` could find old
        facts = check_adapter(staging, base_fingerprint)
        for path in files_of(staging):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        sync(staging)
        os.rename(staging, adapters_dir / version_id)
        sync(adapters_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return StagedAdapter(version_id, version_id, facts)


def discard(adapters_dir: Path, staged: StagedAdapter) -> None:
    """Remove a staged adapter that will not get its row."""
    shutil.rmtree(adapters_dir / staged.path)


def verify(version: AdapterVersion, adapters_dir: Path) -> None:
    """Check that a version's files are what was published.

    Raises:
        AdapterRefused: `adapter_missing` or `adapter_tampered`.
    """
    folder = adapters_dir / version.path
    if not folder.is_dir():
        raise AdapterRefused(
            f"The files of {version.name} are gone from {folder}; restore them from a backup or "
            "train again",
            code="adapter_missing",
        )
    found = digest_of(folder)
    if found != version.digest:
        raise AdapterRefused(
            f"The files of {version.name} in {folder} are not what was published: their digest is "
            f"{found[:12]}…, the registry has {version.digest[:12]}…",
            code="adapter_tampered",
        )


def export(version: AdapterVersion, adapters_dir: Path, destination: Path) -> Path:
    """Copy a version to a new folder that `PeftModel.from_pretrained` loads.

    Raises:
        InvalidInput: The destination exists.
        AdapterRefused: The version's files are damaged.
    """
    if destination.exists():
        raise InvalidInput(
            f"{destination} exists; name a folder that does not", param="destination"
        )
    verify(version, adapters_dir)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        shutil.copytree(adapters_dir / version.path, partial, dirs_exist_ok=True)
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def write_zip(version: AdapterVersion, adapters_dir: Path, stream: BinaryIO) -> None:
    """Write a version's folder as a zip archive, with its lineage as `lineage.json`.

    Raises:
        AdapterRefused: The version's files are damaged.
    """
    verify(version, adapters_dir)
    folder = adapters_dir / version.path
    lineage = {"name": version.name, "base_model": version.base_model, **version.lineage}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
        archive.writestr("lineage.json", json.dumps(lineage, indent=2) + "\n")


def bias_report(version: AdapterVersion, adapters_dir: Path) -> dict[str, Any]:
    """Return what was measured of a version's bias when it was trained.

    Raises:
        NotFound: Nothing was: it was imported, or trained where `bias_reports` was off.
    """
    path = adapters_dir / version.path / bias.FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"There is no bias report of `{version.name}`: it was imported, or trained with "
            "`bias_reports` off. `python -m train.bias --adapter FOLDER` measures what "
            "`GET /v1/models/MODEL/download` hands out.",
            param="model",
            code="bias_report_not_found",
        ) from None
    return {"model": version.name, **found}


def sweep(database: Database, adapters_dir: Path, min_age_s: float = ORPHAN_AGE_S) -> Sequence[str]:
    """Remove folders that no version names, and those of deleted versions; returns their names.

    Args:
        min_age_s: Younger folders may belong to a publication under way.
    """
    with database.read() as session:
        query = select(AdapterVersion.path).where(AdapterVersion.deleted_at.is_(None))
        known = set(session.scalars(query))
    removed = []
    for folder in adapters_dir.iterdir() if adapters_dir.is_dir() else ():
        if not folder.name.startswith((VERSION, STAGING)):
            continue  # not the registry's
        if folder.name not in known and time.time() - folder.stat().st_mtime >= min_age_s:
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def sweep_job(database: Database, adapters_dir: Path, job_id: str) -> None:
    """Remove the folders of a job's versions that were deleted GRACE_S ago, which `sweep` would
    leave lying for longer: a job of many checkpoints fills a disk soon."""
    query = select(AdapterVersion.path).where(
        AdapterVersion.job_id == job_id, AdapterVersion.deleted_at <= now() - GRACE_S
    )
    with database.read() as session:
        paths = list(session.scalars(query))
    for path in paths:
        shutil.rmtree(adapters_dir / path, ignore_errors=True)
