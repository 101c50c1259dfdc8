"""What the processes tell: log lines with their context, metrics in Prometheus' format, and the health routes."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import bottle
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

from core.events import now, rfc3339

HTTP_SECONDS = Histogram("orderproc_http_request_seconds", "Time to answer a request", ["route", "method", "status"])
ORDERS = Counter("orderproc_orders_total", "Orders that reached a status", ["status"])
EVENTS = Counter("orderproc_events_total", "Events sent to the broker", ["type", "outcome"])
OUTBOX_EVENTS = Gauge("orderproc_outbox_events", "Events waiting in outboxes, seen by the last sweep")
OUTBOX_OLDEST = Gauge("orderproc_outbox_oldest_seconds", "Age of the oldest event in an outbox, seen by the last sweep")
DELIVERIES = Counter("orderproc_deliveries_total", "Deliveries by how they ended", ["handler", "outcome"])
HANDLER_SECONDS = Histogram("orderproc_handler_seconds", "Time a handler took", ["handler"])
DEAD_MESSAGES = Gauge("orderproc_dead_messages", "Messages in a dead-letter queue", ["handler"])
BATCH_SIZE = Histogram("orderproc_batch_size", "Items in one bulk", ["what"], buckets=(1, 2, 4, 8, 16, 32, 64, 128))
STORE_COMMANDS = Counter("orderproc_store_commands_total", "Commands sent to the store", ["command"])
SWEEP_RESENT = Counter("orderproc_sweep_resent_total", "Events the sweep sent again", ["handler"])

_context: ContextVar[dict[str, Any]] = ContextVar("log_context")
_ORDINARY = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "about"}


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Put fields (order, event, handler, attempt, trace) on every log line this thread writes inside the block."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class Lines(logging.Formatter):
    """One line per record: JSON for machines, or text for people."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _ORDINARY}
        fields = {**_context.get({}), **extra}
        if record.exc_info:
            fields["stack"] = self.formatException(record.exc_info)
        if self.as_json:
            head = {"at": rfc3339(now()), "level": record.levelname, "logger": record.name}
            return json.dumps(head | {"message": record.getMessage()} | fields, default=str)
        stack = fields.pop("stack", "")
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{now():%H:%M:%S} {record.levelname:<7} {record.getMessage()}{tail}" + (f"\n{stack}" if stack else "")


def set_up_logging(level: str, form: str) -> None:
    """Log to stderr: text on a terminal, JSON elsewhere, unless `form` says which."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json=form == "json" or (not form and not sys.stderr.isatty())))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("botocore", "boto3", "urllib3", "pymongo", "waitress"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # a lost connection is a traceback there and a line of ours


def leave(code: int) -> None:
    """End the process now: a handler that hangs in its thread must not hold it, as it would hold `sys.exit`."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def add_health(app: bottle.Bottle, ready: Callable[[], dict[str, Any]]) -> None:
    """The three routes both processes have. `ready()` gives the body of /readyz; its "ready" decides 200 or 503."""

    # Asks no dependency: an outage elsewhere must not get this process killed.
    app.get("/healthz", callback=lambda: {"alive": True})

    @app.get("/readyz")
    def readyz() -> dict[str, Any]:
        state = ready()
        bottle.response.status = 200 if state["ready"] else 503
        return state

    @app.get("/metrics")
    def metrics() -> bytes:
        bottle.response.content_type = CONTENT_TYPE_LATEST
        return generate_latest(REGISTRY)
