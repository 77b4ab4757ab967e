"""The server's log: one line an event, as text or as JSON, never with prompts or keys."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
QUIET = ("alembic", "httpx", "httpcore")  # the last two tell URLs, which hold webhooks' secrets
FIELDS = "fields"  # the attribute of a record that holds what JSON logs tell beside the message


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Send all loggers to stderr; may be called again to change the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object: time (unix seconds), level, logger, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
