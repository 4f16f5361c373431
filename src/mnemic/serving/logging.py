"""The log: one line of JSON a record, on stderr. What users write and are answered is in it only with `log_text`."""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

from .calls import Call

_requests = logging.getLogger("mnemic.requests")


class Lines(logging.Formatter):
    """A record as a line; `extra={"fields": {...}}` adds fields.

    Args:
        text: whether messages of exceptions are shown. Those of other libraries may quote what a user wrote, so by
            default there are the types and the places alone.
    """

    def __init__(self, text: bool = False):
        super().__init__()
        self.text = text

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = self._exceptions(record.exc_info[1])
        # In ASCII: no character of anybody's can end a line.
        return json.dumps(line, default=str)

    def _exceptions(self, error: BaseException) -> list[dict[str, Any]]:
        """The error, then what it came from."""
        found, seen = [], set()
        at: BaseException | None = error
        while at is not None and id(at) not in seen:
            seen.add(id(at))
            frames = traceback.extract_tb(at.__traceback__)
            one: dict[str, Any] = {"type": type(at).__qualname__}
            if self.text:
                one["message"] = str(at)
            one["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
            found.append(one)
            at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
        return found


def config(text: bool = False) -> dict[str, Any]:
    """For `logging.config.dictConfig`: records of this program and uvicorn from INFO, of all others from WARNING."""
    ours = {"level": "INFO", "handlers": ["stderr"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": Lines, "text": text}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}},
        "loggers": {"mnemic": ours, "uvicorn": ours},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
    }


def log_request(call: Call, route: str, quiet: bool = False) -> None:
    """quiet: at DEBUG."""
    level = logging.DEBUG if quiet else logging.INFO
    if _requests.isEnabledFor(level):
        _requests.log(level, "request", extra={"fields": call.fields(route)})
