"""The frame around every request: a trace, a log line, a measurement, and the pages Bottle answers by itself."""

import logging
import time
from collections.abc import Callable, Iterable
from http import HTTPMethod
from pathlib import Path
from typing import Any

from bottle import Bottle, HTTPResponse, request, response

from core.base import ids, logs, metrics
from core.http.problems import problem, problem_of, reply

log = logging.getLogger("orderproc")


class App(Bottle):
    """Bottle with a trace, a log line and a measurement around each request, whether a route takes it or not."""

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        refuse_odd_path(environ)
        environ["orderproc.traceparent"] = traceparent = ids.new_traceparent(environ.get("HTTP_TRACEPARENT", ""))
        with logs.context(trace=ids.trace_id(traceparent)):
            body = super().wsgi(environ, start_response)
            # The rule, not the path: a client can make up any number of paths, each a time series for ever.
            rule = environ["bottle.route"].rule if "bottle.route" in environ else "none"
            method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in HTTPMethod.__members__ else "other"
            seconds, status = time.perf_counter() - started, response.status_code
            metrics.HTTP_SECONDS.labels(rule, method, status).observe(seconds)
            fields = {"method": method, "route": rule, "status": status, "ms": round(seconds * 1000, 1)}
            log.info("request", extra=fields | environ.get("orderproc.log_fields", {}))
        return body

    def default_error_handler(self, res: HTTPResponse) -> str:
        """What Bottle answers by itself: 404, 405 (with Allow), and 500 for what broke outside a checked call."""
        slug = {404: "not-found", 405: "method-not-allowed"}.get(res.status_code)
        told = problem(slug) if slug else problem_of(res.exception or res)
        response.content_type = told.content_type
        return told.body

    def serve_file(self, path: str, file: Path, kind: str) -> None:
        """Answer a path with a file as it is; nothing that a client sends becomes part of a file's name."""
        self.get(path, callback=lambda: reply(file.read_bytes(), kind=kind))


def refuse_odd_path(environ: dict[str, Any]) -> None:
    """Bottle drops bytes that are not UTF-8, and ignores a last line end: such a path is none of ours, so 404."""
    if not environ["PATH_INFO"].encode("latin-1").decode(errors="surrogateescape").isprintable():
        environ["PATH_INFO"] = "*"


def traceparent() -> str:
    """The W3C trace context of the request in hand."""
    return request.environ["orderproc.traceparent"]


def add_log_fields(**fields: Any) -> None:
    """Put fields on the log line of the request in hand."""
    request.environ["orderproc.log_fields"] = fields
