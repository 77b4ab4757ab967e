"""Adapters that were trained elsewhere: checked, tried on the engine, and published for an account.

`POST /v1/adapters` and `hone models import` both come here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from data import caps, registry
from data.db import Database
from data.errors import AdapterRefused, InvalidInput
from data.job_spec import check_suffix
from data.settings import Settings
from data.tables import AdapterVersion
from serve.engine.base import AdapterRef, Engine, engine_key


def publish_files(
    database: Database,
    settings: Settings,
    account_id: str,
    files: Mapping[str, IO[bytes]],
    base: tuple[str, str],
    engine: Engine,
    suffix: str | None,
) -> AdapterVersion:
    """Publish an adapter and point its alias at it.

    Args:
        files: PEFT's two files by name, `data.adapter_checks.CONFIG` and `WEIGHTS`.
        base: Name and fingerprint of the base that it is for.
        engine: Serves that base; the adapter must pass a forward pass on it.

    Raises:
        InvalidInput: It failed a check, with the reason; nothing is left behind.
        QuotaExceeded: The account may not store so much.
    """
    if suffix is not None:
        check_suffix(suffix)
    with tempfile.TemporaryDirectory(prefix="hone-import-") as scratch:
        folder = Path(scratch) / "adapter"
        folder.mkdir()
        for name, stream in files.items():
            with (folder / name).open("wb") as target:
                shutil.copyfileobj(stream, target)
        size = sum(path.stat().st_size for path in folder.iterdir())
        with database.read() as session:
            caps.check_stored_bytes(session, account_id, settings.limits, size)
        try:
            return registry.publish_imported(
                database,
                settings.adapters_dir,
                account_id,
                folder,
                base,
                suffix,
                try_out=lambda digest: engine.load_adapter(
                    AdapterRef(engine_key(account_id, digest), str(folder), account_id)
                ),
            )
        except AdapterRefused as error:  # of files that the caller has just given: tell the reason
            message = error.message.replace(f"{folder}/", "").replace(str(folder), "the adapter")
            raise InvalidInput(message, param="weights", code=error.code) from error
