"""Structured logs: one JSON object a line."""

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

LOG = logging.getLogger("sg_export.serving")


class JsonLines(logging.Handler):
    """Writes records to standard error, one JSON object a line.

    The fields of `log` follow time, level and event.
    """

    def emit(self, record: logging.LogRecord) -> None:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        try:
            sys.stderr.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            self.handleError(record)


def log(level: int, event: str, /, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Log an event with fields. Fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    LOG.log(level, event, extra={"fields": given}, exc_info=exc_info)
