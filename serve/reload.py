"""SIGHUP: read the configuration again and take over what can change while the server runs.

All or nothing: if a setting changed that only a start can apply, or the file is wrong, the log says
so and the old settings stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from data.errors import ConfigError
from data.settings import Settings
from serve import logs
from serve.runtime import Runtime

RELOADABLE = {
    *("log_level", "log_format", "queue_size", "request_timeout_s", "adapter_cache_mb"),
    *("max_adapters_per_account", "limits", "prices"),
}

log = logging.getLogger("hone.settings")


def reload(runtime: Runtime, read: Callable[[], Settings]) -> bool:
    """Apply the settings as they are read now; False if they were refused."""
    try:
        fresh = read()
    except ConfigError as error:
        log.error("The settings were not reloaded: %s", error)
        return False
    old, new = runtime.settings.model_dump(), fresh.model_dump()
    changed = {name for name in new if new[name] != old[name]}
    if fixed := sorted(changed - RELOADABLE):
        log.error(
            "The settings were not reloaded: %s can change only at a start. Take the change back, "
            "or restart the server.",
            ", ".join(fixed),
        )
        return False
    runtime.apply(fresh)
    logs.set_up(fresh.log_level, fresh.log_format)
    told = ", ".join(f"{name}={new[name]}" for name in sorted(changed)) or "nothing changed"
    log.warning("The settings were reloaded: %s.", told)
    return True
