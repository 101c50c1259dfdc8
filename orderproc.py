"""The REST API: takes orders, shows them, cancels them, sets stock. `python orderproc.py` serves it.

It knows HTTP. What clients may send `core.reading` says; what is stored it asks of `core.store` and `core.stock`, what
is to be announced it hands to `core.outbox`; it knows no handler and no queue. What it promises is in `openapi.json`.
"""

import json
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from http import HTTPMethod
from typing import Any, NamedTuple
from urllib.parse import urlencode

import waitress
from bottle import Bottle, HTTPResponse, request, response
from swagger_ui_bundle import swagger_ui_path

from core import embedded, events, reading, telemetry
from core.bus import BadTopology, Rabbit
from core.localbus import LocalBus
from core.outbox import Outbox
from core.reading import Faulty, Malformed
from core.settings import ROLES, ROOT, ApiKey, BadSetting, Settings, digest, load, warn_of_demo_values
from core.stock import Stock
from core.store import Conflict, KeyReused, Orders, StoreAway, connect, view

log = logging.getLogger("orderproc")


def main() -> int:
    """Serve until SIGTERM or SIGINT: 0 after a clean end, 2 where a setting is wrong."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load(os.environ, need=("MONGODB_URL", "AMQP_URL", "API_KEYS"))
        telemetry.set_up_logging(settings.log_level, settings.log_format)
        warn_of_demo_values(os.environ)
        with ExitStack() as at_end:
            serve(wire(settings, stop, at_end), settings, stop)
    except (BadSetting, BadTopology) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def wire(settings: Settings, stop: threading.Event, at_end: ExitStack) -> Bottle:
    """The app with all it needs around it; what is started for it ends with `at_end`."""
    url = settings.mongodb_url
    if settings.single_process:
        at_end.enter_context(embedded.only_one(settings.data_dir))
    if url == "embedded":
        url = at_end.enter_context(embedded.store(settings.data_dir / "mongo"))
    database = connect(url)
    orders, stock = Orders(database), Stock(database)
    bus: Any = LocalBus() if settings.amqp_url == "embedded" else Rabbit(settings.amqp_url, settings.retry_delays)
    if settings.single_process:
        consume_here(settings, orders, stock, bus, stop, at_end)
    else:
        bus.start_publishing()
        at_end.callback(bus.close)
    return make_app(settings, orders, stock, Outbox(orders, bus), bus)


def consume_here(settings: Settings, orders: Orders, stock: Stock, bus: Any, stop: Any, at_end: ExitStack) -> None:
    """The consumer in this process, beside the API: for `make run`, where one of the two servers is built in."""
    import consumer
    from lambdas import local

    handlers, client = consumer.discover(settings.handlers_dir, settings.handlers), {}
    if settings.mongodb_url in ("embedded", "memory"):
        stock.fill(embedded.CATALOGUE)
    if "AWS_ENDPOINT_URL_LAMBDA" not in os.environ:  # nothing here may ever reach a cloud
        server = local.serve("127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "local"}
        client |= {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    pool = at_end.enter_context(ThreadPoolExecutor(1, "consumer"))
    running = pool.submit(consumer.consume, settings, handlers, orders, stock, bus, stop, **client)
    at_end.callback(running.result)  # raises what ended it
    at_end.callback(stop.set)  # neither half goes on without the other
    running.add_done_callback(lambda _: stop.set())
    while settings.amqp_url == "embedded" and not (bus.consuming or running.done()):
        time.sleep(0.01)


def make_app(settings: Settings, orders: Orders, stock: Stock, outbox: Outbox, bus: Any) -> Bottle:
    """The API as a WSGI app. Of the bus it only asks whether it is `up`."""
    api, app = Api(orders, stock, outbox), App()
    ping = lru_cache(1)(lambda second: orders.ping())  # probes come in crowds; once a second is enough

    def route(method, rule, handler, roles=ROLES, **reads):
        app.route(rule, method, guarded(handler, settings.api_keys, roles, **reads))

    def ready() -> dict[str, Any]:
        up = ping(int(time.monotonic()))  # ready without the broker: orders are accepted and their events wait
        return {"ready": up, "store": "up" if up else "down", "broker": "up" if bus.up else "down"}

    route("POST", "/orders", api.create_order, ("client", "admin"), body=True)
    route("GET", "/orders", api.list_orders, query=("status", "customerId", "limit", "cursor"))
    route("GET", "/orders/<order_id>", api.show_order)
    route("POST", "/orders/<order_id>/cancel", api.cancel_order, ("client", "admin"))
    route("GET", "/stock", api.list_stock, query=("limit", "cursor"))
    route("GET", "/stock/<sku>", api.show_stock)
    route("PUT", "/stock/<sku>", api.set_stock, ("admin",), body=True)
    for path, file, kind in FILES:
        app.get(path, callback=lambda file=file, kind=kind: reply(file.read_bytes(), kind=kind))
    telemetry.add_health(app, ready)
    return app


FILES = (  # served as they are; nothing that a client sends becomes part of a file's name
    ("/", ROOT / "web/index.html", "text/html; charset=utf-8"),
    ("/docs", ROOT / "web/docs.html", "text/html; charset=utf-8"),
    ("/docs/swagger-ui.css", swagger_ui_path / "swagger-ui.css", "text/css; charset=utf-8"),
    ("/docs/swagger-ui-bundle.js", swagger_ui_path / "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    ("/openapi.json", ROOT / "openapi.json", "application/json"),
)


class App(Bottle):
    """Bottle with a trace, a log line and a measurement around each request, whether a route takes it or not."""

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        if not environ["PATH_INFO"].encode("latin-1").decode(errors="surrogateescape").isprintable():
            environ["PATH_INFO"] = "*"  # Bottle drops bytes that are not UTF-8 and matches before a last line end: 404
        environ["orderproc.trace"] = trace = events.new_traceparent(environ.get("HTTP_TRACEPARENT", ""))
        with telemetry.about(trace=trace[3:35]):
            body = super().wsgi(environ, start_response)
            # The rule, not the path: a client can make up any number of paths, each a time series for ever.
            rule = environ["bottle.route"].rule if "bottle.route" in environ else "none"
            method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in HTTPMethod.__members__ else "other"
            seconds, status = time.perf_counter() - started, response.status_code
            telemetry.HTTP_SECONDS.labels(rule, method, status).observe(seconds)
            about = {"method": method, "route": rule, "status": status, "ms": round(seconds * 1000, 1)}
            log.info("request", extra=about | environ.get("orderproc.about", {}))
        return body

    def default_error_handler(self, res: HTTPResponse) -> str:
        """What Bottle answers by itself: 404, 405 (with Allow), and 500 for what broke outside a guarded handler."""
        slug = {404: "not-found", 405: "method-not-allowed"}.get(res.status_code)
        said = problem(slug) if slug else of_exception(res.exception or res)
        response.content_type = said.content_type
        return said.body


# --- what goes wrong is told as RFC 9457 says ----------------------------------------------------------------------

PROBLEMS = {
    "malformed": 400, "unauthorized": 401, "forbidden": 403, "not-found": 404, "method-not-allowed": 405,
    "conflict": 409, "too-large": 413, "unsupported-media-type": 415, "invalid": 422, "key-reused": 422,
    "internal-error": 500, "unavailable": 503,
}  # fmt: skip
EXCEPTIONS = {
    Malformed: "malformed", Faulty: "invalid", KeyReused: "key-reused", Conflict: "conflict", StoreAway: "unavailable",
    Exception: "internal-error",
}  # fmt: skip
HEADERS = {"unauthorized": {"www_authenticate": "Bearer"}, "unavailable": {"retry_after": "2"}}


def problem(slug: str, detail: str = "", **more: Any) -> HTTPResponse:
    """The answer that says what is wrong; raise it or return it."""
    said = {"type": f"urn:orderproc:{slug}", "title": slug.replace("-", " ").capitalize(), "status": PROBLEMS[slug]}
    said |= ({"detail": detail} if detail else {}) | more
    return reply(said, PROBLEMS[slug], "application/problem+json", **HEADERS.get(slug, {}))


def of_exception(error: Exception) -> HTTPResponse:
    """What the table says. The reason of a 5xx is for the log: it may name hosts and files."""
    slug = next(slug for kind, slug in EXCEPTIONS.items() if isinstance(error, kind))
    if slug == "internal-error":
        log.error("unexpected error", exc_info=error)
    errors = [{"pointer": pointer, "message": message} for pointer, message in getattr(error, "faults", ())]
    return problem(slug, str(error) if PROBLEMS[slug] < 500 else "", **({"errors": errors} if errors else {}))


def reply(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> HTTPResponse:
    """Bytes as they are, anything else as JSON, on a line of its own where curl prints it."""
    text = body if isinstance(body, bytes) else json.dumps(body) + "\n"
    return HTTPResponse(text, status, content_type=kind, **headers)


# --- the checks before a handler, in the order in which they are made ----------------------------------------------

LARGEST_BODY = 64 * 1024  # bytes
JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset=("?)utf-8\2\s*)?')


class Asked(NamedTuple):
    """A request that passed the checks."""

    key: ApiKey
    query: dict[str, str]
    body: Any


def guarded(handler: Any, keys: Any, roles: Any, body: bool = False, query: Any = ()) -> Callable[..., HTTPResponse]:
    """The handler behind the checks. What any of them raises becomes a problem."""

    def answer(**path: str) -> HTTPResponse:
        try:
            key, raw = authenticate(keys, roles), read_body() if body else b"null"
            given = reading.read_query(request.query_string, query)
            return handler(Asked(key, given, reading.parse_json(raw)), **path)
        except HTTPResponse as said:
            return said
        except Exception as error:
            return of_exception(error)

    return answer


def authenticate(keys: dict[str, ApiKey], roles: tuple[str, ...]) -> ApiKey:
    match = re.fullmatch("(?i:bearer) +([!-~]+)", _header("AUTHORIZATION", ""))
    key = keys.get(digest(match[1])) if match else None
    if key is None:
        raise problem("unauthorized", "send Authorization: Bearer <secret>")
    if key.role not in roles:
        raise problem("forbidden", f"this takes the role {' or '.join(roles)}")
    return key


def read_body() -> bytes:
    if _header("CONTENT_ENCODING", "identity") != "identity" or not JSON_IN_UTF8.fullmatch(request.content_type):
        raise problem("unsupported-media-type", "send application/json in UTF-8, unencoded")
    body = request.environ["wsgi.input"].read(LARGEST_BODY + 1)  # waitress joins chunks and marks the end
    if len(body) > LARGEST_BODY:
        raise problem("too-large", f"at most {LARGEST_BODY} bytes")
    return body


def _header(name: str, default: Any = None) -> Any:
    return request.environ.get(f"HTTP_{name}", default)  # Bottle's own way raises on bytes that are not UTF-8


# --- the calls -----------------------------------------------------------------------------------------------------


class Api:
    """What each route does with a request that passed the checks."""

    def __init__(self, orders: Orders, stock: Stock, outbox: Outbox) -> None:
        self.orders, self.stock, self.outbox = orders, stock, outbox

    def create_order(self, asked: Asked) -> HTTPResponse:
        key = reading.idempotency_key(_header("IDEMPOTENCY_KEY"))
        order = {"id": events.new_order_id(), "owner": asked.key.name} | reading.read_order(asked.body)
        event = _event("order_created", order["id"])
        document, replayed = self.orders.create(order, event, key, reading.fingerprint(asked.body))
        if not replayed:
            telemetry.ORDERS.labels("pending").inc()
        self.outbox.announce(document)  # a replay too: the first answer may have been lost together with its event
        headers = {"idempotent_replayed": "true"} if replayed else {}
        return _show(document, 201, location=f"/orders/{document['_id']}", **headers)

    def list_orders(self, asked: Asked) -> HTTPResponse:
        where = {name: value for name, value in asked.query.items() if name in ("status", "customerId")}
        where |= {"owner": asked.key.name} if asked.key.role == "client" else {}
        return list_page("orders", "id", asked.query, where, lambda *page: map(view, self.orders.page(where, *page)))

    def show_order(self, asked: Asked, order_id: str) -> HTTPResponse:
        said = _show(self._find(asked, order_id))
        said.set_header("ETag", f'"{digest(said.body)[:32]}"')
        known = _header("IF_NONE_MATCH", "")
        if known.strip() == "*" or said.get_header("ETag") in re.findall('"[^"]*"', known):
            said.status, said.body = 304, ""  # Bottle leaves out the headers that go with a body
        return said

    def cancel_order(self, asked: Asked, order_id: str) -> HTTPResponse:
        self._find(asked, order_id)
        event = _event("order_cancelled", order_id)
        document, cancelled = self.orders.cancel(order_id, event)
        if cancelled:
            telemetry.ORDERS.labels("cancelled").inc()
            self.outbox.announce(document, [event])
        return _show(document)

    def list_stock(self, asked: Asked) -> HTTPResponse:
        return list_page("stock", "sku", asked.query, {}, self.stock.page)

    def show_stock(self, asked: Asked, sku: str) -> HTTPResponse:
        entry = self.stock.get(sku) if reading.SKU.fullmatch(sku) else None
        return reply(entry) if entry else problem("not-found", "there is no such SKU")

    def set_stock(self, asked: Asked, sku: str) -> HTTPResponse:
        return reply(self.stock.put(sku, reading.read_available(sku, asked.body)))

    def _find(self, asked: Asked, order_id: str) -> dict[str, Any]:
        document = self.orders.get(order_id) if reading.ORDER_ID.fullmatch(order_id) else None
        if not document or (asked.key.role == "client" and document["owner"] != asked.key.name):
            raise problem("not-found", "there is no such order")  # a 403 would tell that there is
        return document


def _event(type: str, order_id: str) -> events.Event:
    return events.created_by_api(type, order_id, request.environ["orderproc.trace"])


def _show(document: dict[str, Any], status: int = 200, **headers: str) -> HTTPResponse:
    request.environ["orderproc.about"] = {"order": document["_id"]}
    return reply(view(document), status, **headers)


def list_page(name: str, id: str, query: dict[str, str], where: dict[str, str], fetch: Any) -> HTTPResponse:
    """One page of a list: keyset, so a page costs the same wherever it is and nothing comes twice."""
    limit = int(query.get("limit", "20"))
    found = list(fetch(reading.open_cursor(name, where, query.get("cursor")), limit + 1))
    if len(found) <= limit:
        return reply({name: found, "next": None})
    next = reading.cursor(name, where, found[limit - 1][id])  # there was one more than is shown
    link = f'</{name}?{urlencode(query | {"cursor": next})}>; rel="next"'
    return reply({name: found[:limit], "next": next}, link=link)


# --- serving -------------------------------------------------------------------------------------------------------

DRAIN_SECONDS = 8  # whoever sends SIGTERM waits ten at least
LIMITS = {
    "max_request_header_size": 32 * 1024, "max_request_body_size": 1024 * 1024, "connection_limit": 1000,
    "channel_timeout": 60, "log_socket_errors": False, "ident": None,
}  # fmt: skip


def serve(app: Bottle, settings: Settings, stop: threading.Event) -> None:
    """Answer until `stop` is set; then what was accepted is answered, new connections are refused, and this returns."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise BadSetting(f"HOST, PORT: cannot listen on {settings.host} {settings.port}: {error.strerror}") from None
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it has a line for each request that waits
    sockets: dict[int, Any] = {}
    server = waitress.create_server(app, sockets, sockets=[listener], threads=settings.web_threads, **LIMITS)
    greet(f"http://{settings.host}:{server.effective_port}", settings.single_process)
    turn = partial(server.asyncore.loop, use_poll=True, map=sockets, count=1)
    while not stop.is_set():  # its own loop could not be left without cutting off whoever waits for an answer
        turn(timeout=0.2)
    drain(server, turn)


def greet(address: str, to_a_person: bool) -> None:
    """Say where it is, and to a person who tries it how."""
    if not to_a_person:
        return log.info("listening", extra={"address": address})
    secret = os.environ["API_KEYS"].split(":")[1].split(",")[0]
    order = '{"customerId": "ada", "email": "ada@example.com", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}'
    print(f"orderproc is at {address} with the key {secret}; Ctrl-C ends it. Try:\n")
    print(f"curl {address}/orders -H 'Authorization: Bearer {secret}' \\")
    print(f"  -H 'Content-Type: application/json' -d '{order}'\n", flush=True)


def drain(server: Any, turn: Callable[..., None]) -> None:
    """Answer what was accepted, for some seconds at most."""
    while select.select([server.socket], [], [], 0)[0]:
        server.handle_accept()  # who connected before now is answered
    server.del_channel()
    server.socket.close()
    end = time.monotonic() + DRAIN_SECONDS
    while server.active_channels and time.monotonic() < end:
        turn(timeout=0.05)
        for channel in server.active_channels.values():
            for last in channel.requests[-1:]:
                last.headers["CONNECTION"] = "close"  # so the answer says it, and the client sends no more here
            channel.will_close |= not (channel.requests or channel.request or channel.total_outbufs_len)
    server.task_dispatcher.shutdown(timeout=1)
    server.close()


if __name__ == "__main__":
    telemetry.leave(main())
