"""Structured logs: one line per event on standard error, JSON for machines, text on a terminal.

An event has a name and fields; prompts, answers and keys are never fields. Whatever looks like one
of our keys, a bearer token or a password in an address is masked all the same, because foreign
errors may quote a header or an address.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

from cloudlm.core.settings import LogSettings

request_id_var: ContextVar[str] = ContextVar("request_id", default="")

_KEY = re.compile(r"clm_[a-z]{2,8}_([0-9a-z]{12})_[0-9a-z]{32}(_[0-9a-f]{8})?")
_BEARER = re.compile(r"(?i)\b(bearer)\s+(?!clm_\*)[\w.~+/=-]{16,}")
_PASSWORD = re.compile(r"://[^\s/@]*@")
_FIELD_LIMIT = 2000


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; use ``logger.info("event_name", extra={"fields": {...}})``."""
    return logging.getLogger(name)


def setup_logging(settings: LogSettings, process: str) -> None:
    """Send this process's logs to standard error in the wanted form. Called once, at start."""
    handler = _ToStandardError(sys.stderr)
    text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_TextFormatter() if text else _JsonFormatter(process))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level.upper())
    for chatty in ("aiosqlite", "asyncio", "httpcore2", "httpx2", "urllib3", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def mask(text: str) -> str:
    """``text`` with every API key reduced to its id, and without other tokens and passwords."""
    text = _BEARER.sub(r"\1 ***", _KEY.sub(r"clm_***_\1_***", text))
    return _PASSWORD.sub("://***@", text)


def _event(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", None) or {})
    request_id = request_id_var.get()
    if request_id:
        fields.setdefault("request_id", request_id)
    event = {key: _shorten(value) for key, value in fields.items()}
    if record.exc_info and record.exc_info[1] is not None:
        trace = mask(logging.Formatter().formatException(record.exc_info))
        # Its end says what happened and where.
        event["error"] = trace if len(trace) <= _FIELD_LIMIT else "…" + trace[-_FIELD_LIMIT:]
    return event


def _shorten(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    text = mask(str(value))
    return text if len(text) <= _FIELD_LIMIT else text[:_FIELD_LIMIT] + "…"


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes each line to what standard error is at that moment: while a bar is drawn, that is
    what puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": mask(record.getMessage()),
        }
        own = {key: value for key, value in _event(record).items() if key not in line}
        return json.dumps({**line, **own}, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{key}={value}" for key, value in _event(record).items())
        return f"{stamp} {record.levelname.lower():7} {mask(record.getMessage())} {fields}".rstrip()
