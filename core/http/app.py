"""What is around every call: a trace, a log line, a measurement, and the checks, in the order in which they are made:
key, role, media type, size, query, JSON.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable
from http import HTTPMethod
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from bottle import Bottle, HTTPResponse, request, response

from core.base import ids, logs, metrics
from core.base.settings import ApiKey
from core.http import reading
from core.http.problems import problem, problem_of, reply
from core.http.serving import seconds_waited
from core.store.connection import within

log = logging.getLogger("orderproc")
LARGEST_BODY = 64 * 1024  # bytes
ANSWER_WITHIN = 2.8  # seconds from a request's arrival; the rest of the three is for everything but the store
LONGEST_WAIT = 1.0  # seconds for a thread
CSP = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEALTH = ("/healthz", "/readyz", "/metrics")
JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset=("?)utf-8\2\s*)?')


class App(Bottle):
    """Bottle with a trace, a log line and a measurement around each request, whether a route takes it or not."""

    def __init__(self) -> None:
        super().__init__()
        self.add_hook("before_request", shed)

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        refuse_odd_path(environ)
        environ["wsgi.errors"] = StringIO()  # Bottle writes a traceback of what a call raises; ours is in the log
        environ["HTTP_TRACEPARENT"] = traceparent = ids.new_traceparent(environ.get("HTTP_TRACEPARENT", ""))
        # From its arrival on: who has waited for a thread waits the less for the store.
        with logs.context(trace=ids.trace_id(traceparent)), within(ANSWER_WITHIN - min(seconds_waited(), LONGEST_WAIT)):
            body = super().wsgi(environ, start_response)
            # The rule, not the path: a client can make up any number of paths, each a time series for ever.
            rule = environ["bottle.route"].rule if "bottle.route" in environ else "none"
            method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in HTTPMethod.__members__ else "other"
            seconds, status = time.perf_counter() - started, response.status_code
            metrics.HTTP_SECONDS.labels(rule, method, status).observe(seconds)
            fields = {"method": method, "route": rule, "status": status, "ms": round(seconds * 1000, 1)}
            # A page that is open asks many times a second for what has not changed, and probes never end.
            level = logging.DEBUG if status == 304 or rule in HEALTH else logging.INFO
            log.log(level, "request", extra=fields | environ.get("orderproc.log_fields", {}))
        return body

    def default_error_handler(self, res: HTTPResponse) -> HTTPResponse | str:
        """What Bottle answers by itself, 404 and 405 (with Allow), and what a call raised."""
        slug = {404: "not-found", 405: "method-not-allowed"}.get(res.status_code)
        if slug is None:
            return problem_of(res.exception or res)
        response.content_type = problem(slug).content_type
        return problem(slug).body

    def serve_file(self, path: str, file: Path, kind: str) -> None:
        """Answer a path with a file as it is; nothing that a client sends becomes part of a file's name."""
        self.get(path, callback=lambda: reply(file.read_bytes(), kind=kind, content_security_policy=CSP))


def shed() -> None:
    """Refuse at once what has waited too long for a thread, so that a crowd is not answered late as a whole.

    Raises the problem. Probes are answered whenever it is.
    """
    waited = seconds_waited()
    metrics.REQUEST_QUEUE.observe(waited)
    if waited > LONGEST_WAIT and request.path not in HEALTH:
        metrics.SHED.inc()
        raise problem("unavailable")


def refuse_odd_path(environ: dict[str, Any]) -> None:
    """Bottle drops bytes that are not UTF-8, and ignores a last line end: such a path is none of ours, so 404."""
    if not environ["PATH_INFO"].encode("latin-1").decode(errors="surrogateescape").isprintable():
        environ["PATH_INFO"] = "*"


def add_log_fields(**fields: Any) -> None:
    """Put fields on the log line of the request in hand."""
    request.environ["orderproc.log_fields"] = fields


class Request(NamedTuple):
    """A request that passed the checks."""

    key: ApiKey
    query: dict[str, str]
    body: Any


Call = Callable[..., HTTPResponse]  # of a Request and the parts of the path
Keys = dict[str, ApiKey]  # by the digest of their secrets


def checked(
    call: Call, keys: Keys, roles: Iterable[str], body: bool = False, query: reading.Parameters | None = None
) -> Call:
    """The call behind the checks; `body`: whether it takes one; `query`: the parameters it takes."""

    def respond(**path: str) -> HTTPResponse:
        key, raw = authenticate(keys, roles), read_body() if body else b"null"
        parameters = reading.read_query(request.query_string, query or {})
        return call(Request(key, parameters, reading.parse_json(raw)), **path)

    return respond


def authenticate(keys: Keys, roles: Iterable[str]) -> ApiKey:
    """Whose secret was sent. Raises the problem where it is nobody's, or the role may not do this."""
    match = re.fullmatch("(?i:bearer) +([!-~]+)", header("AUTHORIZATION", ""))
    key = keys.get(ids.digest(match[1])) if match else None
    if key is None:
        raise problem("unauthorized", "send Authorization: Bearer <secret>")
    if key.role not in roles:
        raise problem("forbidden", f"this takes the role {' or '.join(roles)}")
    return key


def read_body() -> bytes:
    """The body, as sent. Raises the problem where it is of another type, or too large."""
    if header("CONTENT_ENCODING", "identity") != "identity" or not JSON_IN_UTF8.fullmatch(request.content_type):
        raise problem("unsupported-media-type", "send application/json in UTF-8, unencoded")
    body = request.environ["wsgi.input"].read(LARGEST_BODY + 1)  # waitress joins chunks and marks the end
    if len(body) > LARGEST_BODY:
        raise problem("too-large", f"at most {LARGEST_BODY} bytes")
    return body


def header(name: str, default: Any = None) -> Any:
    """A header of the request; Bottle's own way raises on bytes that are not UTF-8."""
    return request.environ.get(f"HTTP_{name}", default)
