"""What goes wrong is told as RFC 9457 says: `application/problem+json`. One table gives the status of every error."""

import json
import logging
from typing import Any

from bottle import HTTPResponse

from core.order.schemas import MOST_FAULTS, Fault
from core.store.connection import KeyReused, StoreUnavailable
from core.store.orders import OrderMissing, StatusConflict
from core.store.stock import PreconditionFailed

log = logging.getLogger("orderproc")


PROBLEMS = {
    "malformed": 400, "unauthorized": 401, "forbidden": 403, "not-found": 404, "method-not-allowed": 405,
    "conflict": 409, "precondition-failed": 412, "too-large": 413, "unsupported-media-type": 415, "invalid": 422,
    "key-reused": 422, "internal-error": 500, "unavailable": 503,
}  # fmt: skip
EXCEPTIONS = {
    KeyReused: "key-reused", OrderMissing: "not-found", StatusConflict: "conflict",
    PreconditionFailed: "precondition-failed", StoreUnavailable: "unavailable", Exception: "internal-error",
}  # fmt: skip
HEADERS = {"unauthorized": {"www_authenticate": "Bearer"}, "unavailable": {"retry_after": "2"}}


def problem(slug: str, detail: str = "", **more: Any) -> HTTPResponse:
    """The response that says what is wrong; raise it or return it."""
    body = {"type": f"urn:orderproc:{slug}", "title": slug.replace("-", " ").capitalize(), "status": PROBLEMS[slug]}
    body |= ({"detail": detail} if detail else {}) | more
    return reply(body, PROBLEMS[slug], "application/problem+json", **HEADERS.get(slug, {}))


def invalid(*faults: Fault) -> HTTPResponse:
    """The problem of what can be read and breaks rules: its faults, as (JSON Pointer, what would be right)."""
    errors = [{"pointer": pointer, "message": message} for pointer, message in faults[:MOST_FAULTS]]
    return problem("invalid", f"{len(errors)} fault{'s' * (len(errors) > 1)}", errors=errors)


def problem_of(error: Exception) -> HTTPResponse:
    """What the table says. The reason of a 5xx is for the log: it may name hosts and files."""
    slug = next(slug for kind, slug in EXCEPTIONS.items() if isinstance(error, kind))
    if slug == "internal-error":
        log.error("unexpected error", exc_info=error)
    return problem(slug, str(error) if PROBLEMS[slug] < 500 else "")


def reply(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> HTTPResponse:
    """Bytes as they are, anything else as JSON, on a line of its own where curl prints it."""
    text = body if isinstance(body, bytes) else json.dumps(body) + "\n"
    return HTTPResponse(text, status, content_type=kind, **headers)
