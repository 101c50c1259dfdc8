"""Log lines: one per record, with the context of the thread that wrote it."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from core.base.ids import now, rfc3339

_fields: ContextVar[dict[str, Any]] = ContextVar("log_fields")
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Put fields (order, event, handler, attempt, trace) on every line this thread logs inside the block."""
    token = _fields.set({**_fields.get({}), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


class Lines(logging.Formatter):
    """One line per record: JSON for machines, or text for people."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields.get({}) | {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["stack"] = self.formatException(record.exc_info)
        if self.as_json:
            head = {"at": rfc3339(now()), "level": record.levelname, "logger": record.name}
            return json.dumps(head | {"message": record.getMessage()} | fields, default=str)
        stack = fields.pop("stack", "")
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{now():%H:%M:%S} {record.levelname:<7} {record.getMessage()}{tail}" + (f"\n{stack}" if stack else "")


def text_of(error: BaseException) -> str:
    """What an exception says of itself, in 200 characters; its class alone where it cannot even say that."""
    try:
        return repr(error)[:200]
    except BaseException:
        return type(error).__name__


def raised_at(error: BaseException) -> str:
    """Where an exception comes from, as file:line; empty where it was not raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def set_up_logging(level: str, form: str) -> None:
    """Log to stderr: text on a terminal, JSON elsewhere, unless `form` says which."""
    logging.basicConfig(level=level.upper(), force=True)
    logging.root.handlers[0].setFormatter(Lines(as_json=form == "json" or (not form and not sys.stderr.isatty())))
    for noisy in ("botocore", "boto3", "urllib3", "pymongo", "waitress"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.root.level))
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # a lost connection is a traceback there and a line of ours
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it has a line for each request that waits
