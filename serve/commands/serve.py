"""`hone serve`: the API, the adapters and an embedded training worker, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.common import Overrides

if TYPE_CHECKING:
    from data.settings import Settings


def serve(
    words: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks one.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings as YAML.")] = None,
) -> None:
    """Serve the API on http://127.0.0.1:8000 until told to stop."""
    from data.settings import load_settings
    from serve.server import run

    options = [
        f"{name}={value}" for name, value in (("host", host), ("port", port)) if value is not None
    ]

    def read() -> Settings:
        return load_settings(config, [*(words or ()), *options])

    run(read(), read)
