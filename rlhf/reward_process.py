"""The process in which a reward function of the user's runs; it imports nothing heavy itself."""

from __future__ import annotations

import importlib
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from data.errors import ConfigError


def find_function(name: str) -> Callable[..., Any]:
    """Import `module:function`, whose code runs.

    Raises:
        ConfigError: There is none, or importing its module fails, whatever it raises.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ConfigError([f"the reward function is {name!r}; write it as module:function"])
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            [f"the reward function {name} cannot be imported: {_told(error)}"]
        ) from error
    if not callable(found):
        raise ConfigError(
            [f"the reward function {name} is a {type(found).__name__}, which cannot be called"]
        )
    return found


def serve_function(name: str, pipe: Connection) -> None:
    """Tell whether the function is there, then answer batches until the other end is closed.

    Signals to end are the trainer's to answer: it still needs the rewards of its update.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        function = find_function(name)
    except ConfigError as error:
        pipe.send(("refused", error.problems))
        return
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


def _told(error: BaseException) -> str:
    """Return what an import raised, and the line of the module at which it did."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{kind}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen ")
    ]
    where = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
    return f"{kind}: {error}{where}"


def _number(value: Any) -> Any:
    """Turn numpy's and torch's numbers into plain ones."""
    return value.item() if hasattr(value, "item") else value
