"""The process in which a reward function of the user's runs; it imports nothing heavy itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from data.errors import ConfigError


def find_function(name: str) -> Callable[..., Any]:
    """Import `module:function`.

    Raises:
        ConfigError: There is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"reward.function {name} cannot be imported: {error}"]) from error
    if not callable(found):
        raise ConfigError([f"reward.function is {name!r}; write it as module:function"])
    return found


def serve_function(name: str, pipe: Connection) -> None:
    """Answer batches until the other end is closed."""
    function = find_function(name)
    pipe.send(("ready", None))
    while True:
        try:
            columns = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("scores", [_number(v) for v in function(**columns)])
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainer tells it
            answer = ("error", f"{type(error).__name__}: {error}")
        pipe.send(answer)


def _number(value: Any) -> Any:
    """Turn numpy's and torch's numbers into plain ones."""
    return value.item() if hasattr(value, "item") else value
